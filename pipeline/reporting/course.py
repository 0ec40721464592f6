"""The course of a run: its attempts, what changed between them, how long it trained and how long it did not."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.cluster.last_words import read_last_words
from pipeline.cluster.restarts import read_attempts
from pipeline.distributed.endings import EXIT_DONE
from pipeline.recording.run_log import SUPERSEDED_NAME
from pipeline.reporting.figures import Mark
from pipeline.reporting.formats import duration, is_finite

_TOPOLOGY = {"world_size": "ranks", "zero_stage": "ZeRO", "precision": "precision", "micro_batch_size": "micro-batch"}


@dataclass
class Course:
    """``marks`` are the resumes and rewinds at their steps, ``entries`` the same for the table of events.

    Times are in seconds. Training counts the steps that stand in the log, each once; what was done again, evaluations,
    saves, set-ups and pauses are in the wall time only. None: the log does not say.
    """

    marks: list[Mark] = field(default_factory=list)
    entries: list[dict[str, Any]] = field(default_factory=list)
    attempts: int = 0
    training_seconds: float | None = None
    evaluation_seconds: float = 0.0
    pause_seconds: float = 0.0
    wall_seconds: float | None = None
    ending: str = ""
    clock: list[tuple[float, float]] = field(default_factory=list)  # steps, and the training seconds up to them

    def trained_at(self, step: float) -> float | None:
        """Training seconds up to a step, between lines of the log in proportion; None before and after them."""
        place = bisect_left(self.clock, (step,))
        if not self.clock or step < 0 or place == len(self.clock):
            return None
        (after, ended), (before, begun) = self.clock[place], self.clock[max(place - 1, 0)]
        return ended if step == after else begun + (ended - begun) * (step - before) / (after - before)


def read_course(run_dir: Path, records: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]) -> Course:
    """``records`` are those of log.jsonl that count, ``events`` its events, those of repeated steps included."""
    course = Course(clock=_clock([one for one in records if one["kind"] == "train"]))
    course.training_seconds = course.clock[-1][1] if course.clock else None
    course.evaluation_seconds = sum(
        one["seconds"] for one in records if one["kind"] == "eval" and is_finite(one.get("seconds"))
    )
    attempts = read_attempts(run_dir)
    begins = [
        one
        for one in attempts
        if one["event"] == "begin" and is_finite(one.get("time")) and isinstance(one["hosts"], list)
    ]
    course.attempts = len(begins)
    overtaken = _overtaken(run_dir)
    lived = sorted(one["time"] for one in [*records, *overtaken, *attempts] if is_finite(one.get("time")))
    if len(lived) > 1:
        course.wall_seconds = lived[-1] - lived[0]
    for before, begin in zip(begins, begins[1:]):
        _add_resume(course, before, begin, lived, overtaken)
    for one in events:
        if one["kind"] == "rewind":
            from_step = one.get("from_step")
            again = f"steps {one['step'] + 1} to {from_step} were done again" if is_finite(from_step) else ""
            course.marks.append(Mark(one["step"], "went back", again))
    course.ending = _ending(run_dir, records, attempts)
    return course


def _clock(train: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Each line tells the mean time of a step since the line before, without evaluations and pauses."""
    clock, seconds, last = [(0.0, 0.0)], 0.0, 0
    for one in train:
        if is_finite(one.get("step_seconds")) and one["step"] > last:
            seconds += one["step_seconds"] * (one["step"] - last)
            clock.append((one["step"], seconds))
        last = max(last, one["step"])
    return clock if len(clock) > 1 else []


def _overtaken(run_dir: Path) -> list[dict[str, Any]]:
    """The log lines of steps that were done again; those that can't be read are left out."""
    try:
        lines = (run_dir / SUPERSEDED_NAME).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            one = json.loads(line)
        except ValueError:
            continue
        if isinstance(one, dict) and isinstance(one.get("step"), int) and is_finite(one.get("time")):
            found.append(one)
    return found


def _add_resume(
    course: Course,
    before: Mapping[str, Any],
    begin: Mapping[str, Any],
    lived: Sequence[float],
    overtaken: Sequence[Mapping[str, Any]],
) -> None:
    step = begin["step"] if isinstance(begin["step"], int) else 0
    pause = begin["time"] - max((time for time in lived if time < begin["time"]), default=begin["time"])
    course.pause_seconds += pause
    was, now = _topology(before), _topology(begin)
    changes = [
        f"{was[name]} → {now[name]} {said}" if name == "world_size" else f"{said} {was[name]} → {now[name]}"
        for name, said in _TOPOLOGY.items()
        if name in was and name in now and was[name] != now[name]
    ]
    again = max((one["step"] for one in overtaken if before["time"] <= one["time"] < begin["time"]), default=step)
    details = [f"after a pause of {duration(pause)}", *changes]
    if set(before["hosts"]) != set(begin["hosts"]):
        details.append("on other hosts")
    if again > step:
        details.append(f"steps {step + 1} to {again} were done again")
    course.marks.append(Mark(step, changes[0] if changes else "resumed", ", ".join(details)))
    course.entries.append({"kind": "resume", "step": step, "time": begin["time"], "message": ", ".join(details)})


def _topology(begin: Mapping[str, Any]) -> dict[str, Any]:
    """Of older attempts the number of ranks alone is known."""
    said = begin.get("topology")
    return {"world_size": len(begin["hosts"])} | (dict(said) if isinstance(said, Mapping) else {})


def _ending(run_dir: Path, records: Sequence[Mapping[str, Any]], attempts: Sequence[Mapping[str, Any]]) -> str:
    """How the last attempt ended, in words; "" for runs from before this was written down."""
    words = read_last_words(run_dir)
    if words is None:
        last = attempts[-1] if attempts else None
        if last is None:
            return ""
        if last["event"] == "end":
            return "ended without a word; will be started again" if last["requeued"] else "ended without a word"
        return "still running, or killed without a word" if records else "just begun, or killed without a word"
    early = any(one["kind"] == "early_stop" for one in records)
    if words.code == EXIT_DONE:
        return "done, early" if early else "done"
    who = "" if words.stopped else f"rank {words.rank} on {words.host}: "
    return f"{'stopped' if words.stopped else 'failed'} with {words.code} after step {words.step}: {who}{words.reason}"
