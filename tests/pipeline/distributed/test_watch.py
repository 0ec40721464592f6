"""The end of one rank is the end of all, whatever they are doing, with its code and its last words."""

from __future__ import annotations

import errno
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from torch.distributed import HashStore

from pipeline.distributed import watch as watch_module
from pipeline.distributed.endings import Ending, MachineFailure, judge, lost_rank, silent_rank
from pipeline.distributed.launching import reserve_port
from pipeline.distributed.places import Place
from pipeline.distributed.preempt import Stopped
from pipeline.distributed.rendezvous import meet
from pipeline.distributed.watch import Watch
from tests.forked_program import Job, _become

HOST = socket.gethostname()


def start(world: int, folder: Path, work: Callable[[Watch, Place], None]) -> Job:
    """Ranks that are connected and then do their ``work``, each with its output in a file."""
    listening, variables = reserve_port()
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                _become(folder / f"rank{rank}.txt", variables)
                place = Place(rank, world, rank, "environment")
                watch = Watch(place, *meet(place))
                watch.wait_for_all(60)
                work(watch, place)
                code = 98
            finally:  # a fork must never return into pytest
                os._exit(code)
        pids.append(pid)
    listening.close()
    return Job(pids, folder)


def wait_for_ever() -> None:
    while True:
        time.sleep(60)


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(watch_module, "SAME_REASON_SECONDS", 3.0)


@pytest.mark.slow
def test_a_rank_that_fails_ends_all_with_its_code_and_is_quoted(tmp_path: Path) -> None:
    def work(watch: Watch, place: Place) -> None:
        if place.rank == 2:
            watch.end_by(ValueError("/data: no such folder"), setting_up=True)
        wait_for_ever()

    job = start(3, tmp_path, work)
    assert job.finish() == [2, 2, 2]
    line = f"error: rank 2 on {HOST}: /data: no such folder"
    outputs = [job.output(rank) for rank in range(3)]
    assert outputs == [f"{line}; all ranks end with exit code 2\n", "", f"{line}\n"]


@pytest.mark.slow
def test_what_all_say_is_said_once(tmp_path: Path) -> None:
    def work(watch: Watch, place: Place) -> None:
        watch.end_by(ValueError("steps: expected more"), setting_up=True)

    job = start(3, tmp_path, work)
    assert job.finish() == [2, 2, 2]
    text = "".join(job.output(rank) for rank in range(3))
    assert text.count(": steps: expected more\n") == 1 and text.count("error") == 1 + text.count("all ranks end")


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.slow
def test_a_killed_rank_ends_the_others_for_a_requeue(tmp_path: Path, victim: int) -> None:
    def work(watch: Watch, place: Place) -> None:
        (tmp_path / f"rank {place.rank} works").touch()
        wait_for_ever()

    job = start(3, tmp_path, work)
    while len(list(tmp_path.glob("* works"))) < 3:
        time.sleep(0.01)
    os.kill(job.pids[victim], signal.SIGKILL)
    assert job.finish() == [-9 if rank == victim else 75 for rank in range(3)]
    outputs = [job.output(rank) for rank in range(3)]
    line = f"error: rank {victim} on {HOST}: gone without a word: killed, out of memory, or its node is lost"
    told = f"{line}; all ranks end with exit code 75\n"
    assert outputs == ([told, "", ""] if victim else ["", told, ""])


@pytest.mark.slow
def test_nothing_after_the_end_is_an_end(tmp_path: Path) -> None:
    """Ranks that finish at different times, some long before the others, end with their code."""

    def work(watch: Watch, place: Place) -> None:
        time.sleep(0.2 * place.rank)
        watch.finish(0, lambda: None)

    job = start(3, tmp_path, work)
    assert job.finish() == [0, 0, 0] and [job.output(rank) for rank in range(3)] == ["", "", ""]


@pytest.mark.slow
def test_a_failed_barrier_at_the_end_changes_no_code(tmp_path: Path) -> None:
    def work(watch: Watch, place: Place) -> None:
        def broken() -> None:
            raise RuntimeError("Connection closed by peer")

        watch.finish(0, broken)

    job = start(2, tmp_path, work)
    assert job.finish() == [0, 0] and "done, but not all ranks are" in job.output(1)


@pytest.mark.slow
def test_a_rank_that_does_not_answer_shows_where_it_is(tmp_path: Path) -> None:
    """What it hangs in stands in its own output, although another rank has noticed."""

    def hang_here() -> None:
        wait_for_ever()

    def work(watch: Watch, place: Place) -> None:
        if place.rank == 1:
            watch.end_by(RuntimeError("Timed out waiting 1800000ms for recv operation to complete"), setting_up=False)
        hang_here()

    job = start(2, tmp_path, work)
    assert job.finish() == [75, 75]
    assert "in hang_here" in job.output(0) and "a rank does not answer" in job.output(1)


@pytest.mark.slow
def test_a_failed_collective_is_blamed_on_the_rank_behind_it(tmp_path: Path) -> None:
    def work(watch: Watch, place: Place) -> None:
        if place.rank == 1:
            time.sleep(0.3)
            watch.end_by(KeyError("x"), setting_up=False)
        watch.end_by(RuntimeError("[../gloo/transport/tcp/pair.cc] Connection closed by peer"), setting_up=False)

    job = start(2, tmp_path, work)
    assert job.finish() == [1, 1]
    assert job.output(0) == f"error: rank 1 on {HOST}: KeyError: 'x'; all ranks end with exit code 1\n"
    assert job.output(1).startswith("KeyError: 'x'\n") and job.output(1).count("error: ") == 1


def test_a_rank_that_never_comes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(Place(0, 4, 0, "environment"), HashStore(), "127.0.0.1")
    with pytest.raises(MachineFailure, match=r"3 of 4 ranks are not there after 0.01 s \(ranks 1, 2, 3\)"):
        watch.wait_for_all(0.01)


def test_strangers_are_not_listened_to() -> None:
    watch = Watch(Place(0, 2, 0, "environment"), HashStore(), "127.0.0.1")
    port = watch._server.getsockname()[1]
    for words in (b'["a" * 32, 1, "n"]\n', b'["guess", 1, "n"]\n', b"\xff\n", b"[" * 100_000, b"null\n"):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as stranger:
            with suppress(ConnectionError, OSError):
                stranger.sendall(words)
                stranger.shutdown(socket.SHUT_WR)
            with suppress(ConnectionResetError):
                assert stranger.recv(1) == b""  # closed
    assert watch.ending is None and not watch._complete.is_set()


@pytest.mark.parametrize(
    ("error", "setting_up", "code", "reason"),
    [
        (ValueError("a\nb"), True, 2, "a b"),
        (ValueError("a"), False, 1, "ValueError: a"),
        (Stopped("SIGTERM"), True, 75, "told to stop by SIGTERM before the first step: nothing to save"),
        (MachineFailure("storage hangs"), False, 75, "storage hangs"),
        (OSError(errno.ENOSPC, "No space left on device", "/run/x"), True, 2, "/run/x: No space left on device; free"),
        (OSError(errno.EROFS, "Read-only file system", "/run/x"), False, 2, "/run/x: Read-only file system; free"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/x"), True, 1, "FileNotFoundError"),
        (MemoryError(), False, 2, "out of memory"),
        (KeyError("x"), True, 1, "KeyError: 'x'"),
    ],
)
def test_the_code_tells_a_scheduler_what_to_do(error: BaseException, setting_up: bool, code: int, reason: str) -> None:
    verdict = judge(error, setting_up)
    assert verdict.code == code and verdict.reason.startswith(reason)


def test_collectives_that_fail_because_of_others() -> None:
    assert lost_rank(RuntimeError("Connection reset by peer")) and not lost_rank(ValueError("Broken pipe"))
    assert silent_rank(RuntimeError("Timed out waiting 5000ms")) and not silent_rank(RuntimeError("Broken pipe"))


def test_last_words_survive_the_wire() -> None:
    ending = Ending(3, "n1", 2, 'a "quoted"\nline', True)
    assert Ending.from_json(ending.to_json()) == ending and ending.to_json().count(b"\n") == 1
