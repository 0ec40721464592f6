"""Runs side by side on one page: settings that differ, curves, scorecards, throughput and parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.manifest import write_atomically
from pipeline.config.options import leaves
from pipeline.reporting.evaluations import Evaluation
from pipeline.reporting.figures import NUM_COLOURS, Series, draw
from pipeline.reporting.page import (
    NOT_SCORES,
    SHUFFLED,
    Figure,
    ReportError,
    Run,
    better_way,
    duration,
    evaluations_of,
    load_run,
    number,
    template,
)

COMPARISON_NAME = "comparison.html"
_OF_THE_FOLDER = {"data.paths", "data.tokenizer"}  # settings that name places
_LOWER = ("loss", "median_rank", "perplexity", "distance")  # of values whose task says nothing


@dataclass
class Compared:
    """A run and its evaluations under the name that it has on the page."""

    label: str
    run: Run
    evaluations: list[Evaluation] = field(default_factory=list)


class Value(NamedTuple):
    """A measure of one evaluation: how far it is from that of the first, and the standard error of the difference."""

    value: float | None
    error: float | None
    is_best: bool
    difference: float | None
    difference_error: float | None


@dataclass
class Scorecards:
    """Evaluations of one task and split side by side; ``note`` says what makes them hard to compare."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[Value]]]
    note: str


def write_comparison(run_dirs: Sequence[Path], path: Path) -> Path:
    """Write the page that compares runs to ``path``.

    Raises:
        ReportError: a folder that is no run, one given twice, too many or too few, or nothing that two of them share.
    """
    runs = _load(run_dirs)
    figures = list(_curves(runs))
    cards = _scorecards(runs)
    if not figures and not cards:
        names = ", ".join(one.label for one in runs)
        raise ReportError(f"{names}: no held-out number and no evaluation that two of them share; nothing to compare")
    names, facts = _facts(runs)
    page = template("comparison.html.j2").render(
        runs=runs, names=names, facts=facts, settings=differing_settings(runs), figures=figures, cards=cards
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page)
    return path


def _load(run_dirs: Sequence[Path]) -> list[Compared]:
    if not 2 <= len(run_dirs) <= NUM_COLOURS:
        raise ReportError(f"--runs names {len(run_dirs)} runs, expected 2 to {NUM_COLOURS}")
    resolved = [Path(run).resolve() for run in run_dirs]
    found = []
    for given, run_dir in zip(run_dirs, resolved, strict=True):
        if resolved.count(run_dir) > 1:
            raise ReportError(f"--runs names {given} twice")
        if not run_dir.is_dir():
            raise ReportError(f"{given} is not a folder; give the --output of training runs")
        run, evaluations = load_run(run_dir), evaluations_of(run_dir)
        if not (run.config or run.train or run.held_out or evaluations):
            raise ReportError(f"{given} is no run: neither config.yaml nor log.jsonl nor evaluations in it")
        names = [one.name for one in resolved]
        label = run_dir.name if names.count(run_dir.name) == 1 else f"{run_dir.parent.name}/{run_dir.name}"
        found.append(Compared(label, run, evaluations))
    labels = [one.label for one in found]
    for number_, one in enumerate(found, 1):
        one.label = one.label if labels.count(one.label) == 1 else f"{one.label} ({number_})"
    return found


def _facts(runs: Sequence[Compared]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """What ran on what, how large and how fast: a row of texts for each fact that any run has."""
    rows: dict[str, list[str]] = {}
    for place, one in enumerate(runs):
        for name, value in _facts_of(one.run):
            rows.setdefault(name, ["–"] * len(runs))[place] = value
    return [one.label for one in runs], list(rows.items())


def _facts_of(run: Run) -> list[tuple[str, str]]:
    records, found = run.train + run.held_out, []
    steps = max((record["step"] for record in records), default=None)
    times = [record["time"] for record in records if "time" in record]
    wall = duration(max(times) - min(times)) if len(times) > 1 else None
    median = {name: _median(run.train, name) for name in ("samples_per_second", "step_seconds", "peak_memory_gib")}
    known = {
        "recipe": run.environment.get("recipe"),
        "device": run.environment.get("device_name") or run.environment.get("device"),
        "ranks": run.environment.get("world_size"),
        "precision": run.environment.get("precision"),
        "parameters": run.environment.get("num_parameters"),
        "steps done": steps,
        "wall time": wall,
        "samples per second (median)": median["samples_per_second"],
        "seconds per step (median)": median["step_seconds"],
        "memory, GiB per rank (median of peaks)": median["peak_memory_gib"],
        "GFLOP per sample": _median(run.train, "gflop_per_sample"),
    }
    found += [(name, number(value)) for name, value in known.items() if value not in (None, "")]
    return found


def _median(records: Sequence[dict[str, Any]], name: str) -> float | None:
    values = sorted(record[name] for record in records if _is_number(record.get(name)))
    return values[len(values) // 2] if values else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def differing_settings(runs: Sequence[Compared]) -> list[tuple[str, list[str]]]:
    """Options whose values are not the same in all runs; "–" where a run has no such option, places at the end."""
    settings = [dict(leaves(one.run.config)) for one in runs]
    names = dict.fromkeys(name for found in settings for name in found)
    rows = []
    for name in names:
        values = [str(found[name]) if name in found else "–" for found in settings]
        if len(set(values)) > 1:
            rows.append((name, values))
    return sorted(rows, key=lambda row: row[0] in _OF_THE_FOLDER)


def _curves(runs: Sequence[Compared]) -> list[Figure]:
    """A figure for each held-out number, and for the training loss, that two runs have."""
    figures = []
    kinds = [("Held-out", "held_out", NOT_SCORES | {"step", "time"}), ("Training", "train", None)]
    for title, kind, passed_over in kinds:
        records = [getattr(one.run, kind) for one in runs]
        names = dict.fromkeys(name for found in records for record in found for name in record)
        for name in names if passed_over else ("loss",):
            if name in (passed_over or ()) or name.startswith(SHUFFLED):
                continue
            series = [
                Series(one.label, [step for step, _ in points], [value for _, value in points], colour)
                for colour, (one, found) in enumerate(zip(runs, records, strict=True))
                if (points := [(r["step"], float(r[name])) for r in found if _is_number(r.get(name))])
            ]
            if len(series) > 1:
                ways = {better_way(one.run, name) for one in runs} - {None} if passed_over else {"lower"}
                note = f"{ways.pop()} is better" if len(ways) == 1 else ""
                head = f"{title} {name.replace('_', ' ')}"
                figures.append(Figure(head, note, draw(head, series, smooth=not passed_over)))
    return figures


def _scorecards(runs: Sequence[Compared]) -> list[Scorecards]:
    """Evaluations by task, corpora and split, where there are at least two of them."""
    groups: dict[str, list[tuple[Compared, Evaluation]]] = {}
    for one in runs:
        for evaluation in one.evaluations:
            groups.setdefault(evaluation.title, []).append((one, evaluation))
    return [_side_by_side(title, found) for title, found in groups.items() if len(found) > 1]


def _side_by_side(title: str, found: Sequence[tuple[Compared, Evaluation]]) -> Scorecards:
    columns = []
    for one, evaluation in found:
        step = (evaluation.card.get("checkpoint") or {}).get("step")
        decoding = (evaluation.card.get("decoding") or {}).get("name")
        about = [f"step {step}" if step is not None else "", decoding or ""]
        columns.append(", ".join([one.label, *filter(None, about)]))
    kinds = {"items": "data_fingerprint", "protocol": "protocol", "decoding": "decoding"}
    other = [name for name, key in kinds.items() if any(e.card.get(key) != found[0][1].card.get(key) for _, e in found)]
    note = f"Not alike in all: other {', '.join(other)}. " if other else ""
    names = dict.fromkeys(name for _, evaluation in found for name, _, _ in evaluation.measures)
    rows = []
    for name in names:
        of_each = [{key: (value, error) for key, value, error in e.measures}.get(name, (None, None)) for _, e in found]
        rows.append((name, _values(of_each, _better(name, [one.run for one, _ in found]))))
    return Scorecards(title, columns, rows, note)


def _better(name: str, runs: Sequence[Run]) -> str | None:
    """Which way is better, as the runs' task says, else by the name; counts of items are neither."""
    said = {better_way(run, name) for run in runs} - {None}
    if said:
        return said.pop() if len(said) == 1 else None
    if any(word in name for word in _LOWER):
        return "lower"
    scores = ("accuracy", "consistency", "cider", "bleu", "rouge", "meteor", "spice", "recall", "_at_")
    return "higher" if any(word in name for word in scores) else None


def _values(found: Sequence[tuple[Any, Any]], way: str | None) -> list[Value]:
    """The values of a measure, their differences from the first with standard errors (of independent samples)."""
    numbers = [value if _is_number(value) else None for value, _ in found]
    errors = [error if _is_number(error) else None for _, error in found]
    known = [value for value in numbers if value is not None]
    best = {"higher": max, "lower": min}[way](known) if way and len(set(known)) > 1 else None
    first, first_error = numbers[0], errors[0]
    values = []
    for place, (value, error) in enumerate(zip(numbers, errors, strict=True)):
        difference = None if place == 0 or value is None or first is None else value - first
        both = difference is not None and error is not None and first_error is not None
        of_both = math.hypot(error, first_error) if both else None
        values.append(Value(value, error, value is not None and value == best, difference, of_both))
    return values
