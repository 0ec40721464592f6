"""A ``python`` for the nodes of a test's cluster whose processes are forks of one warm process: no seconds of imports.

What runs is what a fresh interpreter would run, in the environment and with the arguments that the job script gave it.
In the step stands a small client that passes signals on and ends as the fork does.
"""

from __future__ import annotations

import array
import importlib
import json
import os
import selectors
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.forked_command import fork, warm

_CLIENT = """#!{python} -IS
import array, json, os, signal, socket, struct, sys
here = socket.socket(socket.AF_UNIX)
here.connect({path!r})
text = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
streams = array.array("i", [0, 1, 2])
here.sendmsg([struct.pack("I", len(text))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
here.sendall(text)
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda number, _: here.send(bytes([number])))
status = here.recv(4)
code = struct.unpack("i", status)[0] if status else -9
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if code != -9 else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@contextmanager
def warm_python(folder: Path) -> Iterator[Path]:
    """The program that stands for ``python``; its processes end with the context."""
    warm()
    path = folder / "python.socket"
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen(64)
    client = folder / "warm" / "python"
    client.parent.mkdir()
    client.write_text(_CLIENT.format(python=getattr(sys, "_base_executable", sys.executable), path=str(path)))
    client.chmod(0o755)
    with open(folder / "python.out", "ab") as out:
        pid = fork(lambda: _serve(server), out.fileno(), out.fileno())
    server.close()
    try:
        yield client
    finally:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)


def process_file(folder: Path, job: str, attempt: int, rank: int) -> Path:
    """Where a rank of an attempt at a job leaves its process id, in the TEST_FOLDER of its environment."""
    return folder / f"process-{job}-{attempt}-{rank}"


def _rank(environment: dict[str, str]) -> tuple[str, int, int]:
    number = lambda name: int(environment.get(name, 0))  # noqa: E731
    return environment["SLURM_JOB_ID"], number("SLURM_RESTART_COUNT"), number("SLURM_PROCID")


def _keep_pace(file: Path) -> None:
    """Wait before each step for as many seconds as the file says, so that there is time to disturb the run."""
    from pipeline.recording.sample_keys import SampleKeys

    write = SampleKeys.write

    def pause(self, *arguments) -> None:
        time.sleep(float(file.read_text()) if file.exists() else 0)
        write(self, *arguments)

    SampleKeys.write = pause


def _serve(server: socket.socket) -> int:
    """Fork for every client; a client that is gone takes its fork with it."""
    running: dict[int, int] = {}  # the fork of a client, by the client's file descriptor
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopping.append(number))
    with selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        while not stopping:
            for key, _ in selector.select(0.05):
                if key.fileobj is server:
                    client, _ = server.accept()
                    running[client.fileno()] = _start(client, server)
                    selector.register(client, selectors.EVENT_READ)
                    continue
                numbers = b""
                with suppress(ConnectionError):
                    numbers = key.fileobj.recv(16)
                for number in numbers or [signal.SIGKILL]:
                    with suppress(ProcessLookupError):
                        os.kill(running[key.fd], number)
                if not numbers:
                    os.waitpid(running.pop(key.fd), 0)
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
            for key in list(selector.get_map().values()):
                if key.fd in running and (found := os.waitpid(running[key.fd], os.WNOHANG))[0]:
                    del running[key.fd]
                    with suppress(OSError):
                        key.fileobj.sendall(struct.pack("i", os.waitstatus_to_exitcode(found[1])))
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
    for pid in running.values():
        os.kill(pid, signal.SIGKILL)
    return 0


def _start(client: socket.socket, server: socket.socket) -> int:
    head, ancillary, *_ = client.recvmsg(4, socket.CMSG_SPACE(3 * 4))
    streams = array.array("i")
    streams.frombytes(ancillary[0][2])
    (size,) = struct.unpack("I", head)
    with client.makefile("rb", buffering=0) as stream:
        text = b""
        while len(text) < size:
            text += stream.read(size - len(text))
    arguments, environment, folder = json.loads(text)

    def run() -> int | None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setsid()
        for one in (client, server):
            one.close()
        os.dup2(streams[0], 0)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        if "SLURM_STEP_ID" in environment:
            process_file(Path(environment["TEST_FOLDER"]), *_rank(environment)).write_text(str(os.getpid()))
            _keep_pace(Path(environment["TEST_FOLDER"]) / "pace")
        if arguments[0] == "-m":
            module, rest = arguments[1], arguments[2:]
        else:
            module, rest = ".".join(Path(arguments[0]).with_suffix("").parts), arguments[1:]
        sys.argv = [module, *rest]
        if hasattr(importlib.import_module(module), "__path__"):
            module += ".__main__"
        return importlib.import_module(module).main(list(rest))

    pid = fork(run, streams[1], streams[2])
    for one in streams:
        os.close(one)
    return pid
