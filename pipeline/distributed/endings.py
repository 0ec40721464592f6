"""How a rank ends: its exit code, what it says, and the last words that it sends to the other ranks."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import traceback
from typing import NamedTuple, NoReturn

from pipeline.distributed.places import Place
from pipeline.distributed.preempt import Stopped

EXIT_DONE = 0
EXIT_BUG = 1  # look at the traceback
EXIT_MEND = 2  # settings, data or disk: started again as it is, it would end the same way
EXIT_REQUEUE = 75  # told to stop, or the machine failed: started again, it goes on from its newest checkpoint

_OF_A_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EFBIG)
_LOST_RANK = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
_SILENT_RANK = ("Timed out waiting", "Watchdog caught collective operation timeout", "wait timeout after")


class Ending(NamedTuple):
    """Why a rank ends, so that all others end too, with the same code."""

    rank: int
    host: str
    code: int
    reason: str  # one line
    dump_stacks: bool = False  # every rank shows where it is: some rank does not answer
    stopped: bool = False  # told to stop: no failure
    names_cause: bool = True  # the end began with this rank; False: with another one, nobody knows which

    @property
    def line(self) -> str:
        return f"error: rank {self.rank} on {self.host}: {self.reason}"

    def to_json(self) -> bytes:
        return json.dumps(self).encode() + b"\n"

    @classmethod
    def from_json(cls, line: bytes) -> Ending:
        """Raises ValueError or TypeError for anything but what ``to_json`` wrote."""
        rank, host, code, reason, *flags = json.loads(line)
        return cls(int(rank), str(host), int(code), str(reason), *map(bool, flags))


class MachineFailure(RuntimeError):
    """Storage, memory or another process failed, not the program: started again, the run goes on.

    Where it would not, ``code`` says so.
    """

    code = EXIT_REQUEUE


class Verdict(NamedTuple):
    """What an error means for the process that it ends."""

    code: int
    reason: str  # one line
    is_bug: bool = False  # its traceback is shown


def judge(error: BaseException, setting_up: bool) -> Verdict:
    """What an error means; in ``setting_up`` a ValueError is the wording of a mistake that the user can mend."""
    text = " ".join(str(error).split())
    if isinstance(error, MachineFailure):
        return Verdict(error.code, text)
    if isinstance(error, Stopped):
        return Verdict(EXIT_REQUEUE, text)
    if isinstance(error, ValueError) and setting_up:
        return Verdict(EXIT_MEND, text)
    if isinstance(error, OSError) and error.errno in _OF_A_DISK:
        where = f"{error.filename}: " if error.filename is not None else ""
        reason = f"{where}{os.strerror(error.errno)}; free or mend it, or use another --output, then start again"
        return Verdict(EXIT_MEND, reason)
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):  # the former is torch's
        reason = f"out of memory ({text}); lower optim.micro_batch_size (the batch stays the same), or use ZeRO 2 or 3"
        return Verdict(EXIT_MEND, reason, is_bug=True)
    return Verdict(EXIT_BUG, f"{type(error).__name__}: {text}", is_bug=True)


def say(error: BaseException, place: Place | None, setting_up: bool = True) -> int:
    """Print what ended this process before it could talk to other ranks, once a node; returns the exit code."""
    verdict = judge(error, setting_up)
    if verdict.is_bug:
        traceback.print_exception(error)
    if place is None or place.world_size == 1:
        print(f"error: {verdict.reason}", file=sys.stderr, flush=True)
    elif place.local_rank == 0:
        print(Ending(place.rank, host_name(), *verdict[:2]).line, file=sys.stderr, flush=True)
    return verdict.code


def lost_rank(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST_RANK)


def silent_rank(error: BaseException) -> bool:
    """Whether a collective failed because another rank did not take part in time."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SILENT_RANK)


def host_name() -> str:
    """The name of this node: Slurm's where there is one, by which a node is kept out of the next attempt."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def leave(code: int) -> NoReturn:
    """End this process after flushing its output; the interpreter's shutdown is skipped, because gloo's threads may
    abort a correct run in it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # nobody reads it any more, or the disk is full
            pass
    os._exit(code)
