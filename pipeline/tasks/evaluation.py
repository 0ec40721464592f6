"""Runs the passes of an evaluation: in training on all ranks through the engine, or on ranks that work alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from model.batch import Batch
from pipeline.distributed.preempt import StopRequest
from pipeline.distributed.ranks import Agreement
from pipeline.tasks.task import EvaluationPass, Measurement, Prediction

Run = Callable[[Callable[[Any, Batch], Measurement], Batch], Measurement]  # a function of objective and batch, applied


class BatchRecord(NamedTuple):
    """What one batch gave: its positions in the evaluation's order, sums of the quantities (scalars on the device, or
    numbers), predictions, and the unusable samples, (key, reason)."""

    positions: list[int]
    sums: Mapping[str, Tensor | float]
    predictions: list[Prediction]
    problems: list[tuple[str, str]]


class Course(Protocol):
    """How an evaluation proceeds: what is done already, what becomes of a batch's record, whether to stop."""

    def finished(self, number: int) -> list[BatchRecord]:
        """On rank 0: what earlier processes found in pass ``number``."""

    def add(self, number: int, record: BatchRecord) -> BatchRecord:
        """Take note of a batch; returns what counts for it."""

    def stopped(self) -> bool:
        """Whether to stop, asked before every batch."""

    def wait(self, number: int) -> None:
        """This rank has no batch of pass ``number`` left: wait for the others as long as they work."""


class Outcome(NamedTuple):
    """Of an evaluation, on every rank: values by name. On rank 0: the predictions and unusable samples of the first
    pass, in order."""

    values: dict[str, float]
    predictions: list[Prediction]
    problems: list[tuple[str, str]]


class Lockstep:
    """The course in training: nothing is kept, and the ranks agree before every batch, as they compute together."""

    def __init__(self, agreement: Agreement, stop: StopRequest) -> None:
        self._agreement, self._stop = agreement, stop

    def finished(self, number: int) -> list[BatchRecord]:
        return []

    def add(self, number: int, record: BatchRecord) -> BatchRecord:
        return record

    def stopped(self) -> bool:
        return self._agreement.total([self._stop.requested])[0] > 0

    def wait(self, number: int) -> None:
        pass


def evaluate(
    run: Run,
    passes: Sequence[EvaluationPass],
    agreement: Agreement,
    stop: StopRequest,
    folder: Path | None = None,
) -> dict[str, float] | None:
    """The values of all passes by name; None when told to stop. Passes that write do so in ``folder``, if it is given.

    Equal on every rank; every rank must call it. Samples that could not be used are counted as ``bad_samples``, once.
    """
    outcome = run_passes(run, passes, agreement, Lockstep(agreement, stop), folder)
    return None if outcome is None else outcome.values


def run_passes(
    run: Run,
    passes: Sequence[EvaluationPass],
    agreement: Agreement,
    course: Course,
    folder: Path | None = None,
) -> Outcome | None:
    """The same with the predictions, by any ``course``."""
    outcome = Outcome({}, [], [])
    for number, one in enumerate(passes):
        records = _sweep(run, one, number, agreement, course)
        if records is None:
            return None
        values, predictions, problems = {}, [], []
        if agreement.is_main:
            predictions = sorted((item for record in records for item in record.predictions), key=_position)
            problems = [problem for record in sorted(records, key=_positions) for problem in record.problems]
            values = one.summarise(_totals(one.quantities, records), predictions)
            if one.write is not None and folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                one.write(folder, predictions)
        outcome.values.update({f"{one.name}{name}": value for name, value in agreement.from_main(values).items()})
        if number == 0:
            outcome.predictions.extend(predictions)
            outcome.problems.extend(problems)
    if bad := int(agreement.total([len(outcome.problems)])[0]):
        outcome.values["bad_samples"] = bad
    return outcome


def _sweep(
    run: Run, one: EvaluationPass, number: int, agreement: Agreement, course: Course
) -> list[BatchRecord] | None:
    """On rank 0 the records of all batches of a pass, whoever computed them; None, on every rank, when told to stop."""
    records = course.finished(number)
    done = agreement.from_main({position for record in records for position in record.positions})
    loader = one.batches.without(done) if done else one.batches
    if one.begin is not None and loader.most_batches:
        run(lambda objective, _: one.begin(objective), one.placeholder)
    batches, told_to_stop = iter(loader), False
    for _ in range(loader.most_batches):
        if told_to_stop := course.stopped():
            break
        batch = next(batches, None)
        measured = run(one.measure, one.placeholder if batch is None else batch)
        if batch is not None:
            found = BatchRecord(batch.positions, measured.sums, list(measured.predictions), batch.problems)
            records.append(course.add(number, found))
    if loader is not one.batches:
        loader.close()
    course.wait(number)
    if agreement.total([told_to_stop])[0]:
        return None
    records = [record._replace(sums=sums) for record, sums in zip(records, as_numbers(records), strict=True)]
    return [record for part in agreement.gather_to_main(records) for record in part]


def as_numbers(records: Sequence[BatchRecord]) -> list[dict[str, float]]:
    """The sums of all records as numbers of the host; the device is waited for once."""
    waiting = [value for record in records for value in record.sums.values() if isinstance(value, Tensor)]
    found = iter(torch.stack([value.detach().double() for value in waiting]).tolist() if waiting else [])
    return [
        {name: next(found) if isinstance(value, Tensor) else float(value) for name, value in record.sums.items()}
        for record in records
    ]


def _totals(quantities: Iterable[str], records: Sequence[BatchRecord]) -> dict[str, float]:
    """The exact sum of each quantity, rounded once: it does not depend on which rank had which batch."""
    return {name: _sum(record.sums.get(name, 0.0) for record in records) for name in quantities}


def _sum(values: Iterable[float]) -> float:
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):  # infinities of both signs
        return math.nan


def _position(prediction: Prediction) -> int:
    return prediction["position"]


def _positions(record: BatchRecord) -> list[int]:
    return record.positions
