"""A run stops in time to be saved before its job's time is over."""

from __future__ import annotations

import pytest

from pipeline.cluster.walltime import MARGIN_SECONDS, Walltime, end_time
from pipeline.distributed.preempt import TIME_LIMIT, StopRequest


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def steps_until_stop(clock: Clock, end: float, step_seconds: list[float], save_seconds: float) -> int:
    walltime = Walltime(end, lambda: save_seconds, clock)
    for number, seconds in enumerate(step_seconds):
        if walltime.is_up():
            return number
        clock.now += seconds
    raise AssertionError("never stopped")


@pytest.mark.parametrize("save_seconds", [0.0, 3.0, 400.0])
@pytest.mark.parametrize("step_seconds", [0.5, 7.0, 60.0])
def test_this_step_and_the_save_fit_in_and_one_more_would_not(save_seconds: float, step_seconds: float) -> None:
    clock, end = Clock(), 3000.0
    steps_until_stop(clock, end, [step_seconds] * 5000, save_seconds)
    rest = end - clock.now - save_seconds - MARGIN_SECONDS
    assert step_seconds <= rest < 2 * step_seconds  # asked in a step, which is finished before it is saved


def test_a_long_pause_of_late_is_expected_again() -> None:
    """A batch of an evaluation took 100 s, where steps take 1 s."""
    clock, end = Clock(), 1000 + 5 + 100 + 5 + 2 * 100 + 10 + MARGIN_SECONDS
    steps_until_stop(clock, end, [1.0] * 5 + [100.0] + [1.0] * 500, 10.0)
    assert clock.now == 1000 + 5 + 100 + 6


def test_all_that_poll_a_request_learn_of_it_and_it_stays(capfd: pytest.CaptureFixture) -> None:
    stop, answers = StopRequest(), iter([False, True])
    stop.time_is_up = lambda: next(answers)
    assert [stop.requested for _ in range(4)] == [False, True, True, True]
    assert stop.signal_name == TIME_LIMIT and capfd.readouterr().err == f"{TIME_LIMIT}: stopping after this step\n"


@pytest.mark.parametrize(
    ("text", "expected"), [(None, None), ("", None), (" 2000\n", 2000.0), ("999", None), ("1000", None)]
)
def test_the_end_of_the_job(text: str | None, expected: float | None) -> None:
    """One that is past is of another job, or of a shell that exported it."""
    assert end_time({} if text is None else {"OPENFLM_END_TIME": text}, now=1000.0) == expected


@pytest.mark.parametrize("text", ["Unknown", "2026-11-28T14:00:00", "-5", "1e9", "nan"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected seconds since 1970"):
        end_time({"OPENFLM_END_TIME": text}, now=1000.0)
