"""Writes the numbers of a run to log.jsonl, reads them again, and hands them to the trackers."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.recording.step_lines import StepLines, cut_back
from pipeline.recording.trackers import TensorBoardTracker, Tracker, Trackers, WandbTracker

LOG_NAME = "log.jsonl"
EVENTS = {  # by kind
    "incident": "step skipped",
    "rewind": "went back",
    "alarm": "alarm",
    "data_change": "data changed",
    "early_stop": "ended early",
}
SUPERSEDED_NAME = "log.superseded.jsonl"
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl, in file order; a torn line is left out, NaN and infinities are floats again.

    Where a run went back to an earlier step and wrote on, the records it overtook are left out.
    """
    records: list[dict[str, Any]] = []
    last_step: dict[str, int] = {}
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return records
    for line in text.splitlines():
        record = _parse(line)
        if record is None:
            continue
        kind, step = record["kind"], record["step"]
        if last_step.get(kind, -1) >= step:
            records = [r for r in records if r["kind"] != kind or r["step"] < step]
        records.append(record)
        last_step[kind] = step
    return records


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a run in file order: the records of ``EVENTS``, those of steps that were done again included."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return [record for line in lines if (record := _parse(line)) is not None and record["kind"] in EVENTS]


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int) or "kind" not in record:
        return None
    return {
        name: _NOT_FINITE.get(value, value) if isinstance(value, str) and name != "kind" else value
        for name, value in record.items()
    }


def _plain(value: Any) -> Any:
    """A JSON value: numbers of any library become int or float, NaN and infinities strings."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    value = float(value)
    return value if math.isfinite(value) else str(value)


class MetricsWriter:
    """Appends records to RUN/log.jsonl and mirrors their numbers to the trackers; only the main rank writes."""

    def __init__(
        self, output: Path, config: Mapping[str, Any], is_main: bool, tensorboard: bool = True, wandb: bool = False
    ) -> None:
        self._output = Path(output)
        self._is_main = is_main
        self._lines: StepLines | None = None
        self._trackers = Trackers()
        self._purge_step: int | None = None
        if not is_main:
            return
        self._output.mkdir(parents=True, exist_ok=True)
        self._lines = StepLines(self._output / LOG_NAME)
        makers: list[tuple[str, Callable[[], Tracker]]] = []
        if tensorboard:
            make = partial(TensorBoardTracker, self._output, lambda: self._purge_step)
            makers.append((TensorBoardTracker.name, make))
        if wandb:
            makers.append((WandbTracker.name, partial(WandbTracker, self._output, config)))
        self._trackers = Trackers(*makers)

    def log(self, step: int, values: Mapping[str, Any], kind: str = "train") -> None:
        """Appends one record of ``values`` by a single write, so that a kill tears one line at most."""
        if self._lines is None:
            return
        record = {"kind": kind, "step": int(step), "time": round(time.time(), 3)}
        record |= {name: _plain(value) for name, value in values.items()}
        self._lines.write(record)
        numbers = {
            f"{kind}/{name}": float(value)
            for name, value in values.items()
            if value is not None and not isinstance(value, (str, bool)) and math.isfinite(value)
        }
        self._trackers.log(step, numbers)

    def resume_from(self, step: int) -> int:
        """Takes the records after ``step`` out of log.jsonl, into log.superseded.jsonl; returns how many.

        Call it before the first ``log`` of a run that continues from a checkpoint of that step.
        """
        if self._lines is None:
            return 0
        self._purge_step = step + 1
        self._lines.close()
        overtaken = cut_back(self._output / LOG_NAME, step)
        if overtaken:
            with open(self._output / SUPERSEDED_NAME, "a", encoding="utf-8") as file:
                file.writelines(overtaken)
        self._lines = StepLines(self._output / LOG_NAME)
        return len(overtaken)

    def record(self, step: int, kind: str) -> dict[str, Any] | None:
        """The record of that kind that log.jsonl has for ``step``, None if it has none; only the main rank knows."""
        return next((one for one in self.records(kind) if one["step"] == step), None)

    def records(self, kind: str) -> list[dict[str, Any]]:
        """The records of that kind in log.jsonl; only the main rank knows."""
        records = [] if self._lines is None else read_log(self._output / LOG_NAME)
        return [one for one in records if one["kind"] == kind]

    def close(self) -> None:
        """Flushes and closes everything; the writer is silent afterwards."""
        if self._lines is not None:
            self._lines.close()
            self._lines = None
        self._trackers.close()
