"""The course of a run: training time without pauses and evaluations, resumes, other ranks, rewinds, how it ended."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster import restarts
from pipeline.cluster.last_words import LastWords
from pipeline.recording.run_log import MetricsWriter, read_events, read_log
from pipeline.reporting.course import Course, read_course
from pipeline.reporting.page import write_report
from tests.pipeline.reporting.test_report import Page


class Clock:
    """A run that is written down at times that the test says."""

    def __init__(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run, self.now = run, 1_000_000.0
        run.mkdir()
        for module in ("pipeline.recording.run_log", "pipeline.cluster.restarts"):
            monkeypatch.setattr(f"{module}.time.time", lambda: self.now)

    def attempt(self, step: int, ranks: int, stage: int, host: str = "n1") -> MetricsWriter:
        topology = {"world_size": ranks, "zero_stage": stage, "precision": "bf16", "micro_batch_size": 8}
        restarts.begin(self.run, step, [host] * ranks, {}, topology)
        log = MetricsWriter(self.run, {}, is_main=True, tensorboard=False)
        log.resume_from(step or -1)
        return log

    def steps(self, log: MetricsWriter, begin: int, end: int, seconds: float, every: int = 10) -> None:
        for step in range(begin + every, end + 1, every):
            self.now += every * seconds
            log.log(step, {"loss": 1.0, "step_seconds": seconds, "samples_seen": 4 * step})

    def course(self) -> Course:
        return read_course(self.run, read_log(self.run / "log.jsonl"), read_events(self.run / "log.jsonl"))


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(tmp_path / "run", monkeypatch)


def end(run: Path, **changes: Any) -> None:
    words = LastWords(0, "n1", 0, "", False, True, 100, None, 0, 1.0)
    (run / "ending.json").write_text(json.dumps(words._replace(**changes)._asdict()))


def test_training_time_excludes_pauses_evaluations_and_repeated_steps(clock: Clock) -> None:
    log = clock.attempt(0, ranks=2, stage=2)
    clock.steps(log, 0, 60, seconds=2.0)
    clock.now += 50  # an evaluation
    log.log(60, {"loss": 1.0, "seconds": 50.0}, kind="eval")
    clock.steps(log, 60, 80, seconds=2.0)
    log.close()
    clock.now += 3600  # the night; the checkpoint is of step 60
    log = clock.attempt(60, ranks=1, stage=3)
    clock.steps(log, 60, 100, seconds=4.0)
    log.close()
    course = clock.course()
    assert course.training_seconds == 60 * 2.0 + 40 * 4.0 and course.evaluation_seconds == 50
    assert course.pause_seconds == 3600 and course.wall_seconds == 60 * 2 + 50 + 20 * 2 + 3600 + 40 * 4
    assert course.trained_at(30) == 60 and course.trained_at(80) == 120 + 80 and course.trained_at(0) == 0
    assert course.trained_at(101) is None and course.attempts == 2
    (mark,) = course.marks
    assert (mark.at, mark.name) == (60, "2 → 1 ranks")
    assert mark.details == "after a pause of 1 h 00 min, 2 → 1 ranks, ZeRO 2 → 3, steps 61 to 80 were done again"
    text = Page(write_report(clock.run).read_text()).text
    assert "4 min 40 s" in text and "of 1 h 06 min on the wall" in text
    assert "resumed" in text and "ZeRO 2 → 3" in text


def test_a_save_between_two_lines_of_the_log(clock: Clock) -> None:
    """Steps 21 to 25 stand in no line that is left; they took as long as those after them."""
    log = clock.attempt(0, 1, 1)
    clock.steps(log, 0, 30, seconds=1.0)
    log.close()
    log = clock.attempt(25, 1, 1, host="n2")
    clock.steps(log, 20, 40, seconds=3.0)
    log.close()
    course = clock.course()
    assert course.training_seconds == 20 * 1.0 + 20 * 3.0
    assert course.marks[0].name == "resumed" and "on other hosts" in course.marks[0].details


def test_rewinds_are_marked_and_runs_of_older_programs_have_their_ranks(clock: Clock) -> None:
    log = clock.attempt(0, 1, 1)
    clock.steps(log, 0, 30, seconds=1.0)
    log.resume_from(20)
    log.log(20, {"from_step": 33, "checkpoint": "step_00000020"}, kind="rewind")
    clock.steps(log, 20, 50, seconds=1.0)
    log.close()
    old = {"time": clock.now + 5, "event": "begin", "job": None, "attempt": 0, "step": 50, "hosts": ["n1"] * 4}
    with open(clock.run / "attempts.jsonl", "a") as file:
        file.write(json.dumps(old) + "\n" + '{"event": "beg')
    course = clock.course()
    assert {(mark.at, mark.name) for mark in course.marks} == {(20, "went back"), (50, "1 → 4 ranks")}
    assert next(mark for mark in course.marks if mark.at == 20).details == "steps 21 to 33 were done again"
    assert course.training_seconds == 50


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({}, "done"),
        ({"code": 75, "stopped": True, "reason": "told to stop by SIGTERM"},
         "stopped with 75 after step 100: told to stop by SIGTERM"),
        ({"code": 1, "reason": "KeyError: 3"}, "failed with 1 after step 100: rank 0 on n1: KeyError: 3"),
        (None, "still running, or killed without a word"),
    ],
)  # fmt: skip
def test_how_it_ended(clock: Clock, words: dict[str, Any] | None, expected: str) -> None:
    log = clock.attempt(0, 1, 1)
    clock.steps(log, 0, 10, seconds=1.0)
    log.close()
    if words is not None:
        end(clock.run, **words)
    assert clock.course().ending == expected
    assert expected in Page(write_report(clock.run).read_text()).text


def test_matching_has_an_axis_of_its_own(tmp_path: Path) -> None:
    """Its 0.7 beside the 7 of words would flatten both."""
    log = MetricsWriter(tmp_path, {}, is_main=True, tensorboard=False)
    for step in (1, 2, 3):
        log.log(step, {"loss": 9.0, "flm_loss": 7.0 / step, "l2r_loss": 7.0, "itm_loss": 0.7})
        log.log(step, {"flm_loss": 7.0, "itm_loss": 0.7, "shuffled/itm_loss": 0.6}, kind="eval")
    log.close()
    html = write_report(tmp_path).read_text()
    labels = re.findall(r'aria-label="((?:Training|Held-out) loss[^":]*): ([^"]*)"', html)
    assert {title: "0.7" in said for title, said in labels} == {
        "Training loss by step": False,
        "Training loss of matching by step": True,
        "Held-out loss by step": False,
        "Held-out loss of matching by step": True,
    }
