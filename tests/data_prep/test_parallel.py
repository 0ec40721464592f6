"""The map over processes: an interrupt at the worst moment ends it, and does so cleanly."""

from __future__ import annotations

import itertools
import os
import signal
import threading

import pytest

from data_prep.held_signals import held_signals
from data_prep.parallel import Workers, ordered_map


class Told(BaseException):
    pass


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def number(request: pytest.FixtureRequest):
    def tell(*_):
        raise Told

    before = signal.signal(request.param, tell)
    yield request.param
    signal.signal(request.param, before)


def test_a_held_signal_comes_at_the_end(number: int) -> None:
    done = []
    with pytest.raises(Told):
        with held_signals():
            signal.raise_signal(number)
            done.append("within")
            signal.raise_signal(number)
        done.append("after")
    assert done == ["within"]
    with pytest.raises(Told):
        signal.raise_signal(number)


def test_in_another_thread_nothing_is_held() -> None:
    """Handlers run in the main thread only, and only there can they be set."""

    def work() -> None:
        with held_signals():
            done.append(True)

    done: list[bool] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done


@pytest.mark.timeout(60)
@pytest.mark.parametrize("entry", [1, 10])
def test_a_handler_that_raises_leaves_no_lock_of_the_pool_taken(number, entry, monkeypatch) -> None:
    """The signal comes when the lock of a queue or future has just been taken: the pool would wait for it for ever."""
    entries = itertools.count(-1)
    enter = threading.Condition.__enter__

    def interrupted(condition: threading.Condition) -> bool:
        taken = enter(condition)
        if threading.current_thread() is threading.main_thread() and next(entries) == entry:
            signal.raise_signal(number)
        return taken

    results = ordered_map(str, itertools.count(), workers=2, chunk_size=1)
    assert next(results) == "0"
    monkeypatch.setattr(threading.Condition, "__enter__", interrupted)
    with pytest.raises(Told):
        list(results)


def blocked_when_a_worker_starts(_: int) -> bool:
    """The mask that a worker has is the one that it began with: nothing in it changes that."""
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.slow
def test_workers_begin_without_interrupts_and_the_parent_keeps_its_own() -> None:
    """Between its start and its first line of ours, Ctrl-C would end a worker in a traceback."""
    assert list(ordered_map(blocked_when_a_worker_starts, range(4), 2, chunk_size=1)) == [True] * 4
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def _twice(number: int) -> tuple[int, int]:
    return os.getpid(), 2 * number


@pytest.mark.parametrize("number", [1, 2])
def test_processes_serve_several_maps(number: int) -> None:
    with Workers(number) as workers:
        workers.start(_twice)
        found = [list(ordered_map(_twice, range(count), workers, 4)) for count in (50, 0, 30)]
    assert [[value for _, value in one] for one in found] == [[2 * item for item in range(n)] for n in (50, 0, 30)]
    first, second = ({process for process, _ in one} for one in (found[0], found[2]))
    assert len(first | second) <= number and (os.getpid() in first) == (number == 1)
