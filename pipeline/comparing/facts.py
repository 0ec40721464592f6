"""What differs between runs, how they ended and what they cost: rows of a table, a cell for each run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pipeline.comparing.runs import PLACES, Compared, said_of_data
from pipeline.config.options import leaves
from pipeline.reporting.formats import duration, is_finite, number
from pipeline.reporting.reading import Run

Row = tuple[str, list[str]]
UNKNOWN = "–"
_SECTIONS = ("model", "objective", "task", "data", "optim", "train", "guard", "tracking")


def state_rows(runs: Sequence[Compared]) -> list[Row]:
    """What each run is and how far it came."""
    return _table(runs, _state)


def cost_rows(runs: Sequence[Compared]) -> list[Row]:
    """Time, operations and memory of each run."""
    return _table(runs, _cost)


def differing_settings(runs: Sequence[Compared]) -> list[tuple[str, list[Row]]]:
    """(section, rows) of what is not the same in all runs: settings, content of the data, versions, machine.

    "–" where a run has no such setting. Settings that name places stand last in their section.
    """
    settings = [dict(leaves(one.run.config)) for one in runs]
    found: dict[str, list[Row]] = {}
    for name in dict.fromkeys(name for of_run in settings for name in of_run):
        _add(found, name.partition(".")[0], name, [of_run.get(name, UNKNOWN) for of_run in settings])
    _add(found, "data", "content", [said_of_data(one.data) or UNKNOWN for one in runs])
    for name in ("recipe", "git_revision", "python", "cuda"):
        _add(found, "versions", name, [_shortened(one.run.environment.get(name, UNKNOWN)) for one in runs])
    versions = [_versions(one.run) for one in runs]
    for name in dict.fromkeys(name for of_run in versions for name in of_run):
        _add(found, "versions", name, [of_run.get(name, UNKNOWN) for of_run in versions])
    for name in ("device_name", "world_size", "precision", "launcher", "cpu_count", "memory_gib", "platform"):
        _add(found, "machine", name, [one.run.environment.get(name, UNKNOWN) for one in runs])
    for rows in found.values():
        rows.sort(key=lambda row: row[0] in PLACES)
    order = [*(name for name in _SECTIONS if name in found), *(name for name in found if name not in _SECTIONS)]
    return [(name, found[name]) for name in order]


def _add(found: dict[str, list[Row]], section: str, name: str, values: Sequence[Any]) -> None:
    texts = [str(value) for value in values]
    if len(set(texts)) > 1:
        found.setdefault(section, []).append((name, texts))


def _versions(run: Run) -> dict[str, Any]:
    versions = run.environment.get("versions")
    return versions if isinstance(versions, dict) else {}


def _shortened(value: Any) -> Any:
    return value[:10] if isinstance(value, str) and len(value) == 40 else value


def _table(runs: Sequence[Compared], of_run: Callable[[Compared], Iterable[tuple[str, Any]]]) -> list[Row]:
    rows: dict[str, list[str]] = {}
    for place, one in enumerate(runs):
        for name, value in of_run(one):
            cells = rows.setdefault(name, [UNKNOWN] * len(runs))
            if value not in (None, ""):
                cells[place] = number(value)
    return [(name, cells) for name, cells in rows.items() if any(cell != UNKNOWN for cell in cells)]


def _state(one: Compared) -> Iterable[tuple[str, Any]]:
    run, environment = one.run, one.run.environment
    steps = max((record["step"] for record in run.train + run.held_out), default=None)
    planned = run.setting("train.steps")
    yield "state", run.course.ending or None
    yield "steps", f"{number(steps)} of {number(planned)}" if is_finite(planned) and steps is not None else steps
    yield "task", run.setting("task.name")
    yield "objective", run.setting("objective.name")
    yield "recipe", environment.get("recipe")
    seed = run.setting("train.seed")
    yield "seed", None if seed is None else str(seed)
    yield "parameters", environment.get("num_parameters")
    yield "device", environment.get("device_name") or environment.get("device")
    yield "ranks", environment.get("world_size")
    zero = run.deepspeed.get("zero_optimization")
    yield "ZeRO stage", zero.get("stage") if isinstance(zero, dict) else None
    yield "precision", environment.get("precision")
    yield "starts", run.course.attempts or None
    yield "resumed", "; ".join(f"step {number(m.at)}: {m.name}" for m in run.course.marks) or None


def _cost(one: Compared) -> Iterable[tuple[str, Any]]:
    run, course = one.run, one.run.course
    trained, ranks = course.training_seconds, run.environment.get("world_size")
    yield "training time", duration(trained) if trained is not None else None
    yield "device hours of training", trained * ranks / 3600 if trained is not None and is_finite(ranks) else None
    yield "evaluations", duration(course.evaluation_seconds) if course.evaluation_seconds else None
    yield "pauses", duration(course.pause_seconds) if course.pause_seconds else None
    yield "wall time", duration(course.wall_seconds) if course.wall_seconds else None
    samples = max((r["samples_seen"] for r in run.train if is_finite(r.get("samples_seen"))), default=None)
    operations = _median(run.train, "gflop_per_sample")
    yield "samples seen", samples
    yield "samples per second (median)", _median(run.train, "samples_per_second")
    yield "seconds per step (median)", _median(run.train, "step_seconds")
    yield "GFLOP per sample (median)", operations
    yield "operations, PFLOP", samples * operations / 1e6 if samples is not None and operations is not None else None
    yield "memory, GiB per rank (median of peaks)", _median(run.train, "peak_memory_gib")


def _median(records: Sequence[dict[str, Any]], name: str) -> float | None:
    values = sorted(record[name] for record in records if is_finite(record.get(name)))
    return values[len(values) // 2] if values else None
