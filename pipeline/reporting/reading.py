"""Reads the files of a run for its pages."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.recording.run_log import LOG_NAME, read_events, read_log
from pipeline.reporting.course import Course, read_course
from pipeline.reporting.evaluations import Evaluation, EvaluationError, read_evaluations

SAMPLES_NAME = "samples.json"
SHUFFLED = "shuffled/"  # before the names of held-out numbers that were measured with other samples' images
NOT_SCORES = {"seconds", "bad_samples", "captions"}  # of the records of evaluations
_BOOKKEEPING = {"kind", "step", "time"}


class ReportError(ValueError):
    """There is no run to report on."""


@dataclass
class Run:
    """What is known of a run; every part may be absent while it trains."""

    name: str
    config: dict[str, Any]
    environment: dict[str, Any]
    deepspeed: dict[str, Any]
    train: list[dict[str, Any]] = field(default_factory=list)
    held_out: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    samples: dict[str, Any] = field(default_factory=dict)
    course: Course = field(default_factory=Course)

    @property
    def is_empty(self) -> bool:
        return not (self.config or self.train or self.held_out)

    def setting(self, name: str) -> Any:
        """The value of a dotted option, None where config.yaml has none."""
        value: Any = self.config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


def evaluations_of(run_dir: Path) -> list[Evaluation]:
    try:
        return read_evaluations(run_dir)
    except EvaluationError as error:
        raise ReportError(str(error)) from None


def load_run(run_dir: Path) -> Run:
    """Reads the files of a run; absent ones are empty, unreadable ones an error naming the file."""
    records = read_log(run_dir / LOG_NAME)
    train = [record for record in records if record["kind"] == "train"]
    held_out = [record for record in records if record["kind"] == "eval"]
    events = read_events(run_dir / LOG_NAME)
    return Run(
        name=run_dir.resolve().name,
        config=_read(run_dir / "config.yaml", yaml.safe_load),
        environment=_read(run_dir / "environment.json", json.loads),
        deepspeed=_read(run_dir / "ds_config.json", json.loads),
        train=train,
        held_out=held_out,
        events=events,
        samples=_read(run_dir / SAMPLES_NAME, json.loads),
        course=read_course(run_dir, records, events),
    )


def _read(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ReportError(f"{path} cannot be read: {reason}; restore or remove it") from None
    return content if isinstance(content, dict) else {}


def better_way(run: Run, name: str) -> str | None:
    """Which way is better, "lower" or "higher", as the run's task says; older runs have losses and accuracies only."""
    said = run.environment.get("better")
    if isinstance(said, dict):
        return said.get(name.removeprefix(SHUFFLED))
    return "higher" if name.endswith("accuracy") else "lower" if "loss" in name else None


def names_of(records: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the numbers of the records, in order of first appearance."""
    names = {name: None for record in records for name, value in record.items() if isinstance(value, (int, float))}
    return [name for name in names if name not in _BOOKKEEPING]
