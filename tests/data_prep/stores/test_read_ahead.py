"""Reading ahead: in order, a bounded number at a time, errors where they belong, and none left to a forked process."""

from __future__ import annotations

import os
import pickle
import threading
import time

import pytest

from data_prep.stores import read_ahead
from data_prep.stores.read_ahead import ReadAhead


def test_jobs_are_done_before_they_are_taken_and_few_at_a_time(monkeypatch) -> None:
    monkeypatch.setattr(read_ahead, "HELD", 3)
    done: list[int] = []
    ahead = ReadAhead()
    ahead.expect((number, lambda number=number: done.append(number) or number * number) for number in range(10))
    deadline = time.monotonic() + 5
    while len(done) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert sorted(done) == [0, 1, 2]
    assert [ahead.take(number) for number in range(10)] == [number * number for number in range(10)]
    assert ahead.take(3) is None and ahead.take("other") is None
    ahead.close()


def test_an_error_is_raised_where_it_is_taken() -> None:
    def fail() -> None:
        raise KeyError("lost")

    ahead = ReadAhead()
    ahead.expect([("a", fail), ("b", lambda: 1)])
    with pytest.raises(KeyError, match="lost"):
        ahead.take("a")
    assert ahead.take("b") == 1


def test_new_jobs_take_the_place_of_old_ones() -> None:
    gate = threading.Event()
    ahead = ReadAhead()
    ahead.expect((number, gate.wait) for number in range(100))
    gate.set()
    ahead.expect([("new", lambda: "new")])
    assert ahead.take(50) is None and ahead.take("new") == "new"


def test_a_forked_or_pickled_one_begins_anew() -> None:
    ahead = ReadAhead()
    ahead.expect([("a", lambda: 1)])
    assert pickle.loads(pickle.dumps(ahead)).take("a") is None
    pid = os.fork()
    if pid == 0:
        nothing = ahead.take("a") is None
        ahead.expect([("b", lambda: 2)])
        os._exit(0 if nothing and ahead.take("b") == 2 else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert ahead.take("a") == 1
