"""A connection of every rank to rank 0, on which a rank's end is seen at once and its last words reach all others."""

from __future__ import annotations

import faulthandler
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NoReturn

from pipeline.distributed.endings import (
    EXIT_REQUEUE,
    Ending,
    MachineFailure,
    host_name,
    judge,
    leave,
    lost_rank,
    silent_rank,
)
from pipeline.distributed.places import Place
from pipeline.distributed.preempt import Stopped

SILENT_NODE_SECONDS = 40  # until the kernel gives up a connection whose other end does not answer
GRACE_SECONDS = 10.0  # for a rank to end by itself once another one has ended
SAME_REASON_SECONDS = 2.0  # for another rank that ends by the same reason to be the first
_CAUSE_SECONDS = 5.0  # for the last words of another rank, once a collective has failed
_SEND_SECONDS = 5.0
_MAX_LINE_BYTES = 1 << 16
_DONE = b"null"
_GONE = "gone without a word: killed, out of memory, or its node is lost"


class Watch:
    """Ends this rank when another one ends, and all others when this one does.

    A process that dies closes its connection, at once; a node that dies leaves it to the kernel, which asks every few
    seconds and gives up after ``SILENT_NODE_SECONDS``. A slow process is never taken for a dead one: the kernel answers
    for it. The ranks meet at a port that rank 0 leaves in the ``store``.
    """

    def __init__(self, place: Place, store: Any = None, address: str = "") -> None:
        self.place, self.host = place, host_name()
        self._store = store  # rank 0's lives as long as the object
        self.ending: Ending | None = None  # the first one of another rank
        self.take_down: Callable[[Ending], None] = lambda ending: None  # called by the ranks that say why all end
        self.on_note: Callable[[int, dict[str, Any]], None] = lambda rank, note: None  # called by a thread
        self._told = False  # of the ending, by the rank that it began with or by rank 0
        self._ended, self._complete = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._over = False  # all is done: connections close without a meaning
        self._peers: list[_Peer] = []
        self._server: socket.socket | None = None
        if place.world_size == 1:
            return
        if place.is_main:
            self._token = secrets.token_hex(16)
            self._server = socket.create_server(("127.0.0.1" if address == "127.0.0.1" else "", 0), backlog=1024)
            store.set("watch", json.dumps([self._server.getsockname()[1], self._token, self.host]))
        else:
            port, token, host = json.loads(store.get("watch"))
            main = _Peer(socket.create_connection((address, port), timeout=_SEND_SECONDS), rank=0, host=host)
            self._peers.append(main)
            main.send(json.dumps([token, place.rank, self.host]).encode() + b"\n")
        os.register_at_fork(after_in_child=self._close)  # or a loader process would keep a dead rank's connection open
        threading.Thread(target=self._listen, daemon=True, name="watch").start()

    def wait_for_all(self, seconds: float) -> None:
        """On rank 0: wait for the other ranks; raises MachineFailure naming those that are not there in time."""
        if not self.place.is_main or self.place.world_size == 1 or self._complete.wait(seconds):
            return
        missing = sorted({*range(1, self.place.world_size)} - {peer.rank for peer in self._peers})
        shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        raise MachineFailure(
            f"{len(missing)} of {self.place.world_size} ranks are not there after {seconds:g} s (ranks {shown}); their "
            "own last messages have the cause"
        )

    @property
    def own_address(self) -> str | None:
        """The address by which this rank and others reach each other, if there are others."""
        found = [peer.connection.getsockname()[0] for peer in self._peers]
        return next((address for address in found if not address.startswith("127.")), found[0] if found else None)

    def end_by(self, error: BaseException, setting_up: bool) -> NoReturn:
        """End this process because of an error, or because of the end of another rank if that is behind it."""
        if self.place.world_size > 1 and not isinstance(error, Stopped):
            self.follow(_CAUSE_SECONDS if lost_rank(error) or silent_rank(error) else 0)
        if silent_rank(error):
            reason = f"a rank does not answer ({' '.join(str(error).split())}); the stacks of all ranks are shown"
            self._end(self._own(EXIT_REQUEUE, reason)._replace(dump_stacks=True, names_cause=False))
        if lost_rank(error):
            reason = f"another rank is gone; its own last message has the cause ({error})"
            self._end(self._own(EXIT_REQUEUE, reason)._replace(names_cause=False))
        verdict = judge(error, setting_up)
        show = (lambda: traceback.print_exception(error)) if verdict.is_bug else None
        self._end(self._own(verdict.code, verdict.reason)._replace(stopped=isinstance(error, Stopped)), show)

    def _own(self, code: int, reason: str) -> Ending:
        return Ending(self.place.rank, self.host, code, reason)

    def _end(self, ending: Ending, say: Callable[[], None] | None = None) -> NoReturn:
        """Say why this rank ends, by its reason and ``say``, tell the others and end the process.

        What several ranks end by is said by the first of them.
        """
        self._tell(ending)
        if ending.dump_stacks:
            faulthandler.dump_traceback(all_threads=True)
        if self.place.is_main or not self._another_says(ending.reason):
            if say is not None:
                say()
            line = ending.line if self.place.world_size > 1 else f"error: {ending.reason}"
            print(line, file=sys.stderr, flush=True)
            self.take_down(ending)
        leave(ending.code)

    def end_all(self, ending: Ending) -> None:
        """End all ranks because of one that can't say so itself, from any thread; nothing once all is done.

        Every rank that finds it out calls it; rank 0 tells the others.
        """
        self._note(ending)

    def send_note(self, note: Mapping[str, Any]) -> None:
        """Send a small note to rank 0, from rank 0 to all; ``on_note`` gets it there with the sender's rank."""
        line = json.dumps(note).encode() + b"\n"
        for peer in list(self._peers):
            if peer.rank is not None:
                peer.send(line)

    @property
    def hosts(self) -> dict[int, str]:
        """On rank 0: the host of every rank that is there; on the others that of rank 0."""
        others = {peer.rank: peer.host for peer in list(self._peers) if peer.rank is not None}
        return {self.place.rank: self.host, **others}

    def follow(self, seconds: float) -> None:
        """End this process as another rank has ended, if one does within ``seconds``; else return."""
        if self._ended.wait(seconds):
            self._follow()

    def finish(self, code: int, wait: Callable[[], None], reason: str = "") -> NoReturn:
        """End this process when all others are as far; ``wait`` is a barrier, whose failure changes nothing.

        ``reason`` is what rank 0 has taken down.
        """
        self._over = True
        for peer in list(self._peers):
            peer.send(_DONE + b"\n")
        if self.place.is_main:
            self.take_down(self._own(code, reason)._replace(stopped=code == EXIT_REQUEUE))
        try:
            wait()
        except RuntimeError as error:
            print(f"rank {self.place.rank} on {self.host}: done, but not all ranks are: {error}", file=sys.stderr)
        leave(code)

    def _follow(self) -> NoReturn:
        ending = self.ending
        lost_main = ending.rank == 0 and not self._told  # then rank 1 speaks, and a rank of every other node
        if self.place.is_main or (lost_main and (self.place.rank == 1 or self.place.local_rank == 0)):
            print(f"{ending.line}; all ranks end with exit code {ending.code}", file=sys.stderr, flush=True)
            self.take_down(ending)
        leave(ending.code)

    def _another_says(self, reason: str) -> bool:
        return self._ended.wait(SAME_REASON_SECONDS) and self.ending.reason == reason

    def _note(self, ending: Ending, told: bool = False) -> None:
        """Another rank has ended: pass it on, show where this one is if asked, and end if the main thread does not."""
        with self._lock:
            if self.ending is not None or self._over:
                return
            self.ending, self._told = ending, told
        if self.place.is_main:
            self._tell(ending, but=ending.rank if told else -1)
        if ending.dump_stacks:
            faulthandler.dump_traceback(all_threads=True)
        self._ended.set()
        timer = threading.Timer(GRACE_SECONDS, self._follow)
        timer.daemon = True
        timer.start()

    def _tell(self, ending: Ending, but: int = -1) -> None:
        for peer in list(self._peers):
            if peer.rank != but:
                peer.send(ending.to_json())

    def _listen(self) -> None:
        """The thread: takes what comes on every connection until the process ends."""
        with selectors.DefaultSelector() as selector:
            if self._server is not None:
                selector.register(self._server, selectors.EVENT_READ)
            for peer in self._peers:
                selector.register(peer.connection, selectors.EVENT_READ, peer)
            while True:
                for key, _ in selector.select():
                    if key.data is None:
                        with suppress(OSError):  # gone again, or no descriptor left: it is asked for again
                            peer = _Peer(self._server.accept()[0])
                            self._peers.append(peer)
                            selector.register(peer.connection, selectors.EVENT_READ, peer)
                    elif not self._receive(key.data):
                        selector.unregister(key.data.connection)
                        self._peers.remove(key.data)
                        key.data.connection.close()

    def _receive(self, peer: _Peer) -> bool:
        """Take what a connection brings; False when it is at its end."""
        try:
            data = peer.connection.recv(_MAX_LINE_BYTES)
        except OSError:
            data = b""
        *lines, peer.rest = (peer.rest + data).split(b"\n")
        try:
            for line in lines:
                self._take(peer, line)
        except (ValueError, TypeError):  # nobody of ours
            return False
        if not data and peer.rank is not None and not peer.done:
            self._note(Ending(peer.rank, peer.host, EXIT_REQUEUE, _GONE))
        return bool(data) and len(peer.rest) < _MAX_LINE_BYTES

    def _take(self, peer: _Peer, line: bytes) -> None:
        if peer.rank is None:
            token, rank, host = json.loads(line)
            if not secrets.compare_digest(str(token), self._token):
                raise ValueError("another token")
            peer.rank, peer.host = int(rank), str(host)
            if self.ending is not None:  # it comes when another rank has ended already
                peer.send(self.ending.to_json())
            if len({one.rank for one in self._peers} - {None}) == self.place.world_size - 1:
                self._complete.set()
            return
        if line.startswith(b"{"):
            self.on_note(peer.rank, json.loads(line))
            return
        peer.done = True
        if line != _DONE:
            self._note(Ending.from_json(line), told=True)

    def _close(self) -> None:
        for connection in (self._server, *(peer.connection for peer in self._peers)):
            if connection is not None:
                connection.close()


class _Peer:
    """The other end of a connection; ``rank`` is None until it has said who it is."""

    def __init__(self, connection: socket.socket, rank: int | None = None, host: str = "") -> None:
        self.connection, self.rank, self.host, self.rest, self.done = connection, rank, host, b"", False
        self._sending = threading.Lock()  # lines of several threads stay whole
        connection.settimeout(_SEND_SECONDS)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        keepalive = {  # of TCP on Linux, seconds and numbers; the last in milliseconds, while something is on its way
            "TCP_KEEPIDLE": SILENT_NODE_SECONDS // 3,
            "TCP_KEEPINTVL": SILENT_NODE_SECONDS // 6,
            "TCP_KEEPCNT": 4,
            "TCP_USER_TIMEOUT": 1000 * SILENT_NODE_SECONDS,
        }
        for name, value in keepalive.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, line: bytes) -> None:
        with self._sending, suppress(OSError):  # gone, which its connection tells the thread
            self.connection.sendall(line)
