"""Tests of the progress display."""

from __future__ import annotations

import io
import time

import pytest

from pipeline.recording.progress import Progress


def test_progress_writes_plain_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    bar = Progress(10, start=4, stream=stream, interval_seconds=0.0)
    bar.update(5, {"loss": 1.23456, "epoch": 2})
    bar.update(10)
    bar.close()
    first, last = stream.getvalue().splitlines()
    assert first == "step 5/10 | ETA: measuring | loss 1.235, epoch 2"
    assert last.startswith("step 10/10 | ") and "ETA" not in last


@pytest.mark.parametrize("terminal", [False, True])
def test_the_first_step_and_what_was_before_it_are_not_in_the_eta(monkeypatch, terminal: bool) -> None:
    """A minute of set-up and a first step of a minute, then a second a step: 97 s for the rest, not hours."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    bar = Progress(100, stream=stream, interval_seconds=0.0)
    if terminal:
        bar._bar._time = lambda: now
    for step, seconds in ((1, 120.0), (2, 1.0), (3, 1.0)):
        now += seconds
        bar.update(step)
    last = stream.getvalue().replace("\r", "\n").splitlines()[-1]
    assert "3/100" in last and "01:37" in last, stream.getvalue()


def test_progress_is_quiet_between_lines_and_says_the_last_state() -> None:
    stream = io.StringIO()
    bar = Progress(1000, stream=stream, interval_seconds=60.0)
    for step in range(1, 501):
        bar.update(step)
    assert stream.getvalue() == ""
    bar.close()
    bar.close()
    assert stream.getvalue().count("\n") == 1 and "500/1000" in stream.getvalue()


def test_progress_is_a_bar_with_eta_on_a_terminal() -> None:
    stream = io.StringIO()
    stream.isatty = lambda: True
    bar = Progress(10, start=5, stream=stream)
    bar.update(8, {"loss": 0.5})
    bar.close()
    assert "8/10" in stream.getvalue() and "loss 0.5" in stream.getvalue()
