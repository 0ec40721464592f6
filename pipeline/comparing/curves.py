"""Curves of several runs on one axis: by steps, by samples seen, by hours of training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from pipeline.comparing.runs import Compared, Group
from pipeline.reporting.figures import FEW, Mark, Series, draw
from pipeline.reporting.formats import is_finite, spoken
from pipeline.reporting.reading import NOT_SCORES, SHUFFLED, Run, better_way, names_of
from pipeline.reporting.run_figures import is_loss, without_repeated_total

AXES = {"step": "step", "samples": "samples seen", "hours": "hours of training"}  # key -> what it is called
SECONDS_PER_HOUR = 3600


@dataclass
class Figure:
    """A titled figure, drawn once for each axis: (key of the axis, inline SVG)."""

    title: str
    note: str
    drawn: list[tuple[str, Markup]]


def figures(groups: Sequence[Group]) -> list[Figure]:
    """One for each training loss and each held-out number that two runs have."""
    runs = [one for group in groups for one in group.runs]
    found = []
    for name in _shared([one.run.train for one in runs], is_loss):
        longest = max(len(one.run.train) for one in runs)
        said = "thin: each line of the log; thick: exponential mean over a fortieth of a run's lines, 2 at least"
        notes = [_unlike_terms(runs) if name == "loss" else "", said if longest > FEW else ""]
        found.append(_figure(f"Training {spoken(name)}", notes, groups, name, lambda run: run.train, smooth=True))
    for name in _shared([one.run.held_out for one in runs], _is_score):
        ways = {better_way(one.run, name) for one in runs} - {None}
        notes = [f"{ways.pop()} is better" if len(ways) == 1 else "", _unlike_terms(runs) if name == "loss" else ""]
        found.append(_figure(f"Held-out {spoken(name)}", notes, groups, name, lambda run: run.held_out))
    return [one for one in found if one.drawn]


def not_on(key: str, runs: Sequence[Compared]) -> list[str]:
    """Runs that logged something but can't stand on an axis."""
    return [one.label for one in runs if one.run.train and _place(one.run, key)(one.run.train[-1]["step"]) is None]


def _shared(records: Sequence[Sequence[dict[str, Any]]], accept: Callable[[str], bool]) -> list[str]:
    """Names that two runs have; not the total where it is each run's only term, which is there by its own name."""
    counts = Counter(name for of_run in records for name in names_of(of_run) if accept(name))
    shared = [name for name, count in counts.items() if count > 1]
    owned = [[name for name in names_of(of_run) if name in shared] for of_run in records]
    told = [without_repeated_total(of_run, names) for of_run, names in zip(records, owned, strict=True)]
    return shared if any("loss" in names for names in told) else [name for name in shared if name != "loss"]


def _is_score(name: str) -> bool:
    return name not in NOT_SCORES and not name.startswith(SHUFFLED) and not name.endswith("_standard_error")


def _unlike_terms(runs: Sequence[Compared]) -> str:
    objectives = {(one.run.setting("task.name"), one.run.setting("objective.name")) for one in runs}
    return "of unlike objectives: a sum of other terms in each" if len(objectives) > 1 else ""


def _figure(
    title: str,
    notes: Sequence[str],
    groups: Sequence[Group],
    name: str,
    records_of: Callable[[Run], list[dict[str, Any]]],
    smooth: bool = False,
) -> Figure:
    drawn = []
    for key, axis in AXES.items():
        series, marks = [], []
        for group in groups:
            label = group.label
            for one in group.runs:
                place = _place(one.run, key)
                points = [(place(r["step"]), float(r[name])) for r in records_of(one.run) if is_finite(r.get(name))]
                points = [(at, value) for at, value in points if at is not None]
                if points:
                    series.append(Series(label, [at for at, _ in points], [value for _, value in points], one.colour))
                    marks += _marks(one, place)
                    label = ""  # once for a group
        if len(series) > 1:
            drawn.append((key, draw(title, series, smooth, axis=axis, marks=marks)))
    return Figure(title, "; ".join(filter(None, notes)), drawn)


def _place(run: Run, key: str) -> Callable[[int], float | None]:
    """From a step to its place on an axis, None where the run does not tell."""
    if key == "hours":
        return lambda step: None if (s := run.course.trained_at(step)) is None else s / SECONDS_PER_HOUR
    if key == "samples":
        size = run.setting("optim.batch_size")
        seen = [r["samples_seen"] / r["step"] for r in run.train if is_finite(r.get("samples_seen")) and r["step"]]
        size = seen[-1] if seen else size
        return lambda step: step * size if is_finite(size) else None
    return float


def _marks(one: Compared, place: Callable[[int], float | None]) -> list[Mark]:
    marks = [(place(mark.at), mark) for mark in one.run.course.marks]
    return [
        Mark(at, "", f"{one.label}, step {mark.at:.0f}: {mark.name}, {mark.details}", one.colour)
        for at, mark in marks
        if at is not None
    ]
