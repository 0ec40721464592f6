"""Scores of several runs side by side: with the spread over the runs of a group, or the standard error of one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.comparing.runs import Compared, Group
from pipeline.reporting.evaluations import Evaluation
from pipeline.reporting.formats import is_finite
from pipeline.reporting.reading import NOT_SCORES, SHUFFLED, Run, better_way
from pipeline.reporting.run_figures import without_repeated_total

_LOWER = ("loss", "median_rank", "perplexity", "distance")  # of values whose task says nothing
_HIGHER = ("accuracy", "consistency", "cider", "bleu", "rouge", "meteor", "spice", "recall", "_at_")
_ERROR = "_standard_error"


class Value(NamedTuple):
    """A measure of a column: of one evaluation with its standard error, or the mean of several with their deviation
    (of a sample, n - 1) and the standard error of the mean; and how far it is from the first column."""

    value: float | None
    error: float | None
    deviation: float | None
    count: int
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


@dataclass
class _Measured:
    """What one run was found to reach: values and standard errors by name."""

    compared: Compared
    group: Group
    step: int | None
    about: str
    values: Mapping[str, Any]
    errors: Mapping[str, Any]
    card: Mapping[str, Any]


def scorecards(groups: Sequence[Group]) -> list[Scorecards]:
    """The last held-out numbers, then evaluations by task, corpora and split; where there are two of them."""
    titles: dict[str, list[_Measured]] = {}
    for group in groups:
        for one in group.runs:
            if one.run.held_out:
                titles.setdefault("Held-out data, last evaluation in training", []).append(_held_out(one, group))
    for group in groups:
        for one in group.runs:
            for evaluation in one.evaluations:
                titles.setdefault(evaluation.title, []).append(_evaluated(one, group, evaluation))
    found = [_side_by_side(title, of_title) for title, of_title in titles.items() if len(of_title) > 1]
    return [one for one in found if one.rows]


def _held_out(one: Compared, group: Group) -> _Measured:
    last = one.run.held_out[-1]
    values = {name: value for name, value in last.items() if name not in NOT_SCORES | {"kind", "step", "time"}}
    errors = {name.removesuffix(_ERROR): value for name, value in values.items() if name.endswith(_ERROR)}
    values = {name: value for name, value in values.items() if not name.endswith(_ERROR)}
    read = [one.data, *map(one.run.setting, ("data.eval_split", "train.eval_samples"))] if one.data else None
    return _Measured(one, group, last["step"], "", values, errors, {"data_fingerprint": read})


def _evaluated(one: Compared, group: Group, evaluation: Evaluation) -> _Measured:
    card = evaluation.card
    step = (card.get("checkpoint") or {}).get("step")
    about = (card.get("decoding") or {}).get("name") or ""
    values = {name: value for name, value, _ in evaluation.measures}
    return _Measured(one, group, step, about, values, {name: error for name, _, error in evaluation.measures}, card)


def _side_by_side(title: str, found: Sequence[_Measured]) -> Scorecards:
    columns = _columns(found)
    kinds = {"items": "data_fingerprint", "protocol": "protocol", "decoding": "decoding"}
    other = [name for name, key in kinds.items() if any(e.card.get(key) != found[0].card.get(key) for e in found)]
    notes = [f"Not alike in all: other {', '.join(other)}."] if other else []
    if any(one.card.get("data_fingerprint") is None for one in found):
        notes.append("Which items were judged is not told of all.")
    if any(len(column) > 1 for _, column in columns):
        notes.append("Of n runs: their mean ± its standard error, and s, the standard deviation between them.")
    rows = []
    names = list(dict.fromkeys(name for one in found for name in one.values))
    for name in without_repeated_total([one.values for one in found], names):
        holders = [column for _, column in columns if any(is_finite(one.values.get(name)) for one in column)]
        if len(holders) > 1 or any(len(column) > 1 for column in holders):
            rows.append((name, _values(name, [column for _, column in columns], "items" not in other)))
    return Scorecards(title, [label for label, _ in columns], rows, " ".join(notes))


def _columns(found: Sequence[_Measured]) -> list[tuple[str, list[_Measured]]]:
    """A column for each group and way of decoding; where a run was scored more than once, for each step of it."""
    ways: dict[tuple[int, str], list[_Measured]] = {}
    for one in found:
        ways.setdefault((one.group.colour, one.about), []).append(one)
    columns = []
    for of_way in ways.values():
        parts: dict[int | None, list[_Measured]] = {None: of_way}
        if len({id(one.compared) for one in of_way}) < len(of_way):
            parts = {}
            for one in of_way:
                parts.setdefault(one.step, []).append(one)
        for part in parts.values():
            steps = sorted({one.step for one in part if one.step is not None})
            when = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}" if steps else ""
            name = part[0].compared.label if len(part) == 1 else part[0].group.label
            columns.append((", ".join(filter(None, [name, when, part[0].about])), part))
    return columns


def _values(name: str, columns: Sequence[Sequence[_Measured]], same_items: bool) -> list[Value]:
    """The values of a measure, and of a score their differences from the first with standard errors (of independent
    samples); the best is only told of equal items."""
    of_each = [_mean(name, column) for column in columns]
    way = _better(name, [one.compared.run for column in columns for one in column])
    known = [value for value, *_ in of_each if value is not None]
    best = {"higher": max, "lower": min}[way](known) if way and same_items and len(set(known)) > 1 else None
    first, first_error = of_each[0][:2]
    values = []
    for place, (value, error, deviation, count) in enumerate(of_each):
        apart = place > 0 and way is not None and value is not None and first is not None
        difference = value - first if apart else None
        both = difference is not None and error is not None and first_error is not None
        of_both = math.hypot(error, first_error) if both else None
        is_best = value is not None and value == best
        values.append(Value(value, error, deviation, count, is_best, difference, of_both))
    return values


def _mean(name: str, column: Sequence[_Measured]) -> tuple[float | None, float | None, float | None, int]:
    """(value, standard error, deviation, number of runs) of a column."""
    known = [one for one in column if is_finite(one.values.get(name))]
    if not known:
        return None, None, None, 0
    if len(known) == 1:
        error = known[0].errors.get(name)
        return known[0].values[name], error if is_finite(error) else None, None, 1
    values = [one.values[name] for one in known]
    deviation = statistics.stdev(values)
    return statistics.fmean(values), deviation / math.sqrt(len(values)), deviation, len(values)


def _better(name: str, runs: Sequence[Run]) -> str | None:
    """Which way is better, as the runs' task says, else by the name; counts of items are neither, nor is what was
    measured with other images."""
    if name.startswith(SHUFFLED) or "wrong_image" in name:
        return None
    said = {better_way(run, name) for run in runs} - {None}
    if said:
        return said.pop() if len(said) == 1 else None
    if any(word in name for word in _LOWER):
        return "lower"
    return "higher" if any(word in name for word in _HIGHER) else None
