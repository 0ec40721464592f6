"""Writes the numbers of a run to log.jsonl and the progress bar, and hands them to the trackers."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from pipeline.reporting.step_lines import StepLines, cut_back
from pipeline.reporting.trackers import TensorBoardTracker, Tracker, Trackers, WandbTracker

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

# Dense peak rates of one GPU in 1e12 FLOP/s; where a datasheet gives the rate with sparsity, half of it. The first
# entry whose words all occur in the device name counts, so the special forms of a chip stand before the plain one.
# Sources: NVIDIA datasheets "V100", "A100", "H100 Tensor Core GPU", "H200 Tensor Core GPU", "GH200 Superchip",
# "L40S", "L4", and the whitepaper "NVIDIA Ada GPU Architecture" (RTX 4090, fp32 accumulation).
_PEAK_TERAFLOPS: list[tuple[str, dict[str, float]]] = [
    ("H200 NVL", {"bf16": 835.5, "fp16": 835.5, "tf32": 417.5, "fp32": 60}),
    ("H200", {"bf16": 989.5, "fp16": 989.5, "tf32": 494.5, "fp32": 67}),
    ("H100 NVL", {"bf16": 835.5, "fp16": 835.5, "tf32": 417.5, "fp32": 60}),
    ("H100 PCIe", {"bf16": 756.5, "fp16": 756.5, "tf32": 378, "fp32": 51}),
    ("GH200", {"bf16": 989.5, "fp16": 989.5, "tf32": 494.5, "fp32": 67}),
    ("H100", {"bf16": 989.5, "fp16": 989.5, "tf32": 494.5, "fp32": 67}),
    ("A100", {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5}),
    ("L40S", {"bf16": 362, "fp16": 362, "tf32": 183, "fp32": 91.6}),
    ("L4", {"bf16": 121, "fp16": 121, "tf32": 60, "fp32": 30.3}),
    ("RTX 4090", {"bf16": 165.2, "fp16": 165.2, "tf32": 82.6, "fp32": 82.6}),
    ("V100 PCIe", {"fp16": 112, "fp32": 14}),
    ("V100", {"fp16": 125, "fp32": 15.7}),
]
_LESSER_FORMS = {"laptop", "mobile", "max", "d", "mig"}  # same name, other rate
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"}


def peak_flops(device_name: str, dtype: object) -> float | None:
    """Dense peak FLOP/s of one GPU by its name (``torch.cuda.get_device_name``), None where it is not known.

    ``dtype`` is a torch dtype or one of bf16, fp16, tf32, fp32.
    """
    precision = str(dtype).removeprefix("torch.")
    precision = _DTYPES.get(precision, precision)
    words = set(device_name.lower().replace("-", " ").split())
    if words & _LESSER_FORMS:
        return None
    for chip, rates in _PEAK_TERAFLOPS:
        if words.issuperset(chip.lower().split()):
            rate = rates.get(precision)
            return None if rate is None else rate * 1e12
    return None


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

    def progress(self, total: int, start: int = 0, unit: str = "step") -> Progress:
        """A progress display of steps ``start`` .. ``total``; it shows nothing on other ranks."""
        return Progress(total, start, unit, enabled=self._is_main)

    def close(self) -> None:
        """Flushes and closes everything; the writer is silent afterwards."""
        if self._lines is not None:
            self._lines.close()
            self._lines = None
        self._trackers.close()


class Progress:
    """A tqdm bar with ETA on a terminal, a plain line every so often elsewhere (job logs, pipes)."""

    def __init__(
        self,
        total: int,
        start: int = 0,
        unit: str = "step",
        enabled: bool = True,
        stream: TextIO | None = None,
        interval_seconds: float = 15.0,
    ) -> None:
        self._total, self._start, self._unit, self._enabled = total, start, unit, enabled
        self._stream = stream or sys.stderr
        self._interval_seconds = interval_seconds
        self._began = self._shown = time.monotonic()
        self._bar = None
        self._step, self._postfix = start, ""
        self._line_step: int | None = None
        if enabled and self._stream.isatty():
            self._bar = tqdm(
                total=total, initial=start, unit=unit, file=self._stream, dynamic_ncols=True, smoothing=0.1
            )

    def update(self, step: int, postfix: Mapping[str, Any] | None = None) -> None:
        """Says that ``step`` is done; ``postfix`` are a few numbers shown behind it."""
        self._step = step
        if not self._enabled:
            return
        if postfix is not None:
            shown = {name: f"{v:.4g}" if isinstance(v, float) else str(v) for name, v in postfix.items()}
            self._postfix = ", ".join(f"{name} {value}" for name, value in shown.items())
        if self._bar is not None:
            self._bar.set_postfix_str(self._postfix, refresh=False)
            self._bar.update(step - self._bar.n)
        elif time.monotonic() - self._shown >= self._interval_seconds:
            self._write_line()

    def close(self) -> None:
        """Ends the display; the last state stays visible."""
        if self._bar is not None:
            self._bar.close()
        elif self._enabled and self._step > self._start and self._line_step != self._step:
            self._write_line()
        self._enabled = False

    def _write_line(self) -> None:
        self._shown, self._line_step = time.monotonic(), self._step
        rate = (self._step - self._start) / max(self._shown - self._began, 1e-9)
        parts = [f"{self._unit} {self._step}/{self._total}", f"{rate:.2f} {self._unit}s/s"]
        if rate and self._step < self._total:
            parts.append("ETA " + tqdm.format_interval(int((self._total - self._step) / rate)))
        if self._postfix:
            parts.append(self._postfix)
        self._stream.write(" | ".join(parts) + "\n")
        self._stream.flush()
