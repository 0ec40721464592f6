"""Quality against time, operations and samples: the curves of a speedrun's trainings, and when they reach a target."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.probes.__main__ import read_probes
from pipeline.recording.run_log import LOG_NAME, read_log

PROBES = {  # in the order of the report: the higher the better, all of them
    "vqa_accuracy": "VQA accuracy, linear probe",
    "matching_accuracy": "image-text matching, linear probe",
    "caption_main_object": "captions naming the main object",
    "caption_exact_match": "captions equal to a reference",
    "caption_cider_d": "captions, CIDEr-D",
    "caption_cider_d_gain": "captions, CIDEr-D above other images' references",
    "finetuned_cider_d": "fine-tuned captions, CIDEr-D",
    "finetuned_cider_d_gain": "fine-tuned captions, CIDEr-D above other images' references",
    "finetuned_mean_recall": "fine-tuned retrieval, mean recall",
    "finetuned_accuracy": "fine-tuned answers, accuracy",
}
AXES = {"seconds": "training time, s", "tflop": "TFLOP", "samples": "samples seen"}


@dataclass
class Point:
    """A checkpoint of a run: what it had cost until then, and what the probes found."""

    step: int
    seconds: float
    tflop: float
    samples: int
    probes: dict[str, float]


@dataclass
class Run:
    """One training: a row with a seed. ``points`` begin with the untrained model; ``held_out`` is of its own losses."""

    row: str
    seed: int
    points: list[Point] = field(default_factory=list)
    held_out: dict[str, tuple[float, float]] = field(default_factory=dict)  # name: before, after
    skipped: dict[str, str] = field(default_factory=dict)  # probe: why
    starting_weights: dict[str, str | None] | None = None  # by part; None where that is not known

    @property
    def last(self) -> Point:
        return self.points[-1]


def read_run(folder: Path, row: str, seed: int, batch_size: int, every: int, step_seconds: float | None = None) -> Run:
    """The curve of a finished run folder: a point every so many steps. What a bad step left for its replay is none.

    With ``step_seconds``, what a step costs, time is the number of steps times that, else as the run's log has it.
    """
    records = read_log(folder / LOG_NAME)
    clock = clock_of([record for record in records if record["kind"] == "train"], batch_size, step_seconds)
    run = Run(row, seed)
    for record in read_probes(folder):
        if record["step"] % every:
            continue
        seconds, tflop = clock[record["step"]]
        probes = {name: value for name, value in record.items() if isinstance(value, float) and name != "seconds"}
        if "caption_blind_cider_d" in probes:
            probes["caption_cider_d_gain"] = probes["caption_cider_d"] - probes["caption_blind_cider_d"]
        run.points.append(Point(record["step"], seconds, tflop, record["step"] * batch_size, probes))
        run.skipped |= record.get("skipped", {})
    evaluations = [record for record in records if record["kind"] == "eval"]
    if len(evaluations) > 1:
        first, last = evaluations[0], evaluations[-1]
        names = [name for name in last if name.endswith("loss") and "/" not in name and name in first]
        run.held_out = {name: (first[name], last[name]) for name in names}
    return run


def clock_of(
    records: Iterable[Mapping[str, Any]], batch_size: int, step_seconds: float | None = None
) -> dict[int, tuple[float, float]]:
    """step -> (seconds of training, TFLOP of forward and backward) until then; evaluations and saves are not in it.

    A log line speaks of the steps since the line before it.
    """
    clock, step, seconds, tflop = {0: (0.0, 0.0)}, 0, 0.0, 0.0
    for record in records:
        steps = record["step"] - step
        seconds += steps * (step_seconds or record["step_seconds"])
        tflop += steps * batch_size * record["gflop_per_sample"] / 1000
        step = record["step"]
        clock[step] = (seconds, tflop)
    return clock


def reached(xs: Sequence[float], ys: Sequence[float], target: float) -> float | None:
    """Where the line through the points first is at ``target`` or above, None if it never is."""
    if ys[0] >= target:
        return xs[0]
    for (x0, y0), (x1, y1) in zip(zip(xs, ys), zip(xs[1:], ys[1:])):
        if y1 >= target:
            return x0 + (x1 - x0) * (target - y0) / (y1 - y0)
    return None


def curve(run: Run, probe: str, axis: str) -> tuple[list[float], list[float]]:
    """(cost, quality) of the points at which the probe was measured."""
    points = [point for point in run.points if probe in point.probes]
    return [getattr(point, axis) for point in points], [point.probes[probe] for point in points]


def mean_curve(runs: Sequence[Run], probe: str, axis: str) -> tuple[list[float], list[float]]:
    """Mean over seeds, point by point."""
    curves = [curve(run, probe, axis) for run in runs]
    return tuple(
        [statistics.fmean(values) for values in zip(*parts, strict=True)] for parts in zip(*curves, strict=True)
    )


def has_curve(runs: Iterable[Run], probe: str) -> bool:
    """Whether any run was probed by it more than once."""
    return any(len(curve(run, probe, "samples")[0]) > 1 for run in runs)


def finals(runs: Sequence[Run], probe: str) -> list[float]:
    """The last value of each seed."""
    return [run.last.probes[probe] for run in runs if probe in run.last.probes]


def measured_probes(runs: Iterable[Run]) -> list[str]:
    """The probes that any run has, in the order of the report; equality with a reference where there is no other."""
    found = {name for run in runs for point in run.points for name in point.probes}
    if "caption_cider_d" in found and "caption_main_object" not in found:
        found.discard("caption_exact_match")  # of free text it is next to never anything but 0
    return [name for name in PROBES if name in found]


def targets(by_row: Mapping[str, Sequence[Run]], target_rows: Sequence[str], probe: str) -> tuple[str, float] | None:
    """(row, final mean) of the best of ``target_rows``, None without one."""
    means = {
        row: statistics.fmean(finals(by_row[row], probe)) for row in target_rows if finals(by_row.get(row, ()), probe)
    }
    if not means:
        return None
    best = max(means, key=means.get)
    return best, means[best]


def time_to_target(
    by_row: Mapping[str, Sequence[Run]], target_rows: Sequence[str], probe: str, axis: str
) -> dict[str, Any] | None:
    """When each row reaches the final mean of the best target row, and how many times as much that row needs for it.

    That row's own cost is where its mean curve is first there. A seed's ratio is that over the seed's own cost; a seed
    that never gets there has cost None and counts as ratio 0 in median, min and max. None where there is no target row,
    where the untrained models are there already, or of a probe of the last checkpoint alone.
    """
    found = targets(by_row, target_rows, probe)
    if found is None or not has_curve([run for runs in by_row.values() for run in runs], probe):
        return None
    reference, target = found
    reference_cost = reached(*mean_curve(by_row[reference], probe, axis), target * (1 - 1e-12))
    if not reference_cost:
        return None
    rows = {}
    for row, runs in by_row.items():
        costs = [reached(*curve(run, probe, axis), target) for run in runs]
        ratios = [0.0 if cost is None else math.inf if cost == 0 else reference_cost / cost for cost in costs]
        rows[row] = {
            "cost": costs,
            "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
            "seeds_there": sum(cost is not None for cost in costs),
        }
    return {"target": target, "reference": reference, "reference_cost": reference_cost, "rows": rows}
