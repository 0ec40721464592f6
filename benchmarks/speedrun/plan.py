"""From a budget to optimizer steps: what a row's step costs, and how many of them the budget buys."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.speedrun.rows import Row
from data_prep.manifest import write_atomically
from pipeline.config.options import ConfigError, flatten

ROUNDS = 3  # of calibration, where time is what is measured
FEW_STEPS = 100  # below, a model of the recipe demo has learnt nothing that the probes see
DROPPED_LINES = 2  # of a calibration's log: kernels warm up, loaders start
EVERY_ROW = "every row"
_NOT_COMPARED = {
    "data.paths",
    "data.tokenizer",
    "train.steps",
    "train.seed",
}  # names; the contents of files are compared
_MISSING = object()


@dataclass(frozen=True)
class Budget:
    """What every row may spend: minutes of training, TFLOP of forward and backward, or optimizer steps."""

    kind: Literal["minutes", "tflop", "steps"]
    amount: float

    def __str__(self) -> str:
        return f"{self.amount:g} {'TFLOP' if self.kind == 'tflop' else self.kind}"


@dataclass(frozen=True)
class Cost:
    """What a row costs, measured on short trainings of it; ``gflop_per_sample`` by the formula of model/flops.py."""

    step_seconds: float
    gflop_per_sample: float


def steps_within(budget: Budget, row: Row, cost: Cost | None, evaluations: int) -> int:
    """The most steps within a row's share of the budget that ``evaluations`` divides; ``cost`` unless it is in steps.

    Raises:
        ConfigError: the budget does not last for one step per evaluation.
    """
    amount = budget.amount * row.budget_share
    if budget.kind == "steps":
        each = 1.0
    elif budget.kind == "minutes":
        each = cost.step_seconds / 60
    else:
        each = cost.gflop_per_sample * row.config.optim.batch_size / 1000
    steps = int(amount / each * (1 + 1e-9)) // evaluations * evaluations  # 1e-9: 0.3 / 0.1 is three
    if not steps:
        needed = each * evaluations / row.budget_share
        raise ConfigError(
            f"row {row.name}: {budget} last for {amount / each:.1f} steps, expected at least one for each of "
            f"{evaluations} evaluations; give at least {needed:.3g}, or fewer --evaluations"
        )
    return steps


def hours_of_training(budget: Budget, rows: Iterable[Row], seeds: int, jobs: int) -> float | None:
    """Hours that the trainings of these rows take, ``jobs`` at a time; None where the budget is not one of time."""
    if budget.kind != "minutes":
        return None
    return sum(budget.amount * row.budget_share for row in rows) * seeds / 60 / jobs


def too_few_steps(name: str, steps: int) -> str | None:
    """What is to be said of a row whose trainings are too short to tell rows apart; None where they are not."""
    if steps >= FEW_STEPS:
        return None
    return (
        f"warning: row {name} trains for {steps} steps, fewer than {FEW_STEPS}: expect scores of chance and targets "
        "that are not reached; give more of the budget"
    )


def cost_of(rounds: Sequence[Iterable[Mapping[str, Any]]]) -> Cost:
    """The cost told by the log records of a row's calibration trainings, all lines but the first ones.

    Of their step times it is the lower quartile: what else happens on a machine only ever makes steps longer.

    Raises:
        ConfigError: too few lines.
    """
    lines = []
    for records in rounds:
        lines += [record for record in records if record["kind"] == "train"][DROPPED_LINES:]
    if not lines:
        raise ConfigError(f"a calibration logged no more than {DROPPED_LINES} lines; give more --calibration-steps")
    flops = [line["gflop_per_sample"] for line in lines]
    seconds = sorted(line["step_seconds"] for line in lines)
    return Cost(seconds[len(seconds) // 4], statistics.fmean(flops))


def calibration_order(rows: Sequence[Row], number: int) -> list[Row]:
    """The rows in the order of a round: forwards, then backwards and shifted by one, then every other one first.

    So what drifts meanwhile meets all rows alike, and side by side each has other neighbours in each round.
    """
    if number == 0:
        return list(rows)
    if number == 1:
        return [*rows[:1], *reversed(rows[1:])]
    return [*rows[::2], *rows[1::2]]


def identity(rows: Sequence[Row], fixed: Mapping[str, Any]) -> dict[str, Any]:
    """What two commands must share to go on in one folder: ``fixed`` and every option of every row, by name."""
    found = dict(fixed)
    for row in rows:
        found |= {f"row {row.name}": "trained", f"row {row.name}, budget_share": row.budget_share}
        settings = {key: value for key, value in flatten(row.config) if key not in _NOT_COMPARED}
        found |= {f"row {row.name}, {key}": value for key, value in settings.items()}
    return json.loads(json.dumps(found))


def accept_command(path: Path, wanted: Mapping[str, Any], seeds: Sequence[int]) -> None:
    """Note the command's identity in ``path``, or compare it with what an earlier one noted there.

    Seeds may be added. An option that only one of the two program versions knows is not compared.

    Raises:
        ConfigError: the folder belongs to another command; names what differs.
    """
    before = read_json(path)
    if before:
        there = before["identity"]
        differences = changes(there, wanted)
        differences += [f"{name} only here" for name in wanted if _is_row(name) and name not in there]
        differences += [f"{name} only there" for name in there if _is_row(name) and name not in wanted]
        gone = [seed for seed in before["seeds"] if seed not in seeds]
        differences += [f"seeds {gone} only there"] if gone else []
        if differences:
            raise ConfigError(
                f"{path.parent} belongs to another command ({few(differences)}); "
                "give that command again, or another --output"
            )
    write_json(path, {"identity": dict(wanted), "seeds": list(seeds)})


def changes(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What two identities both say, each otherwise."""
    return [
        f"{name}: {there[name]!r} there, {value!r} here"
        for name, value in here.items()
        if name in there and there[name] != value
    ]


def few(differences: Sequence[str]) -> str:
    """The first ones in words, and how many more."""
    more = f", and {len(differences) - 3} more" if len(differences) > 3 else ""
    return f"{'; '.join(differences[:3])}{more}"


def packed(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The identity with what all rows have alike written once, for ``every row``; :func:`unpacked` is the way back."""
    rows = [name for name in identity if _is_row(name)]
    shared = {
        name.removeprefix(f"{rows[0]}, "): value
        for name, value in identity.items()
        if name.startswith(f"{rows[0]}, ")
        and all(identity.get(name.replace(rows[0], row, 1), _MISSING) == value for row in rows)
    }
    own = {name: value for name, value in identity.items() if name.partition(", ")[2] not in shared}
    return own | {f"{EVERY_ROW}, {name}": value for name, value in shared.items()}


def unpacked(content: Mapping[str, Any]) -> dict[str, Any]:
    """The identity that :func:`packed` wrote."""
    rows, shared = [name for name in content if _is_row(name)], f"{EVERY_ROW}, "
    found = {name: value for name, value in content.items() if not name.startswith(shared)}
    for name, value in content.items():
        if name.startswith(shared):
            found |= {f"{row}, {name.removeprefix(shared)}": value for row in rows}
    return found


def _is_row(name: str) -> bool:
    return name.startswith("row ") and "," not in name


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, an empty one where there is no file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{path}: not readable ({error}); remove the file to have it made again") from None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """In one move: a kill leaves the old file or the new one."""
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def costs_from(stored: Mapping[str, Any]) -> dict[str, Cost]:
    return {name: Cost(**cost) for name, cost in stored.get("costs", {}).items()}


def costs_to(costs: Mapping[str, Cost]) -> dict[str, Any]:
    return {"costs": {name: asdict(cost) for name, cost in costs.items()}}
