"""How long a run would take: steps, evaluations and saves at what each of them takes."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from pipeline.config.options import Config, TrainConfig
from pipeline.dry_run.run_folder import count_saves

FIRST_STEPS = 2  # in which memory is allocated and kernels are chosen; slower than the rest


@dataclass(frozen=True)
class Measured:
    """What a short training took, in seconds.

    ``evaluations`` are the one before the first step and the one after the last, of as many samples as the steps have.
    ``loading`` is what the loaders need for a step with nothing beside them, None where they are not processes of
    their own.
    """

    start: float  # of the process until its first step
    steps: tuple[float, ...]
    evaluations: tuple[float, ...]
    save: float  # until it is on disk
    save_stall: float  # for which training waits
    loading: float | None
    peak_bytes: int  # of the largest rank: on a GPU what tensors had, on a CPU the process

    @property
    def step(self) -> float:
        """Seconds of a step of a long run: the loaders have nothing prepared by then that they do not keep up with."""
        own = statistics.mean(self.steps[FIRST_STEPS:] or self.steps[-1:])
        return max(own, self.loading or 0.0)


def count_evaluations(train: TrainConfig, first_step: int) -> int:
    """Evaluations from ``first_step`` to the end: one before the first step of a run, one after the last."""
    if first_step >= train.steps:
        return 0
    last = train.steps - 1
    regular = last // train.eval_every - first_step // train.eval_every if train.eval_every else 0
    return (first_step == 0) + regular + 1


def held_out_samples(config: Config, held_out: int) -> int:
    """Samples of one evaluation."""
    return held_out if config.train.eval_samples is None else min(held_out, config.train.eval_samples)


def at_rate(config: Config, first_step: int, held_out: int, samples_per_second: float, source: str) -> dict[str, Any]:
    """The time at a throughput of training; an evaluated sample counts as a third of a trained one: forward alone."""
    step = config.optim.batch_size / samples_per_second
    evaluation = held_out_samples(config, held_out) / (3 * samples_per_second)
    return _together(config.train, first_step, held_out, source, step, [evaluation, evaluation], 0.0, 0.0, 0.0)


def as_measured(config: Config, first_step: int, held_out: int, measured: Measured) -> dict[str, Any]:
    """The time at what was measured; an evaluation of more samples than were measured takes as much longer."""
    of_all, trained = held_out_samples(config, held_out), len(measured.steps) * config.optim.batch_size
    share = max(of_all / trained, 1.0)
    evaluations = [share * seconds for seconds in measured.evaluations]
    first = sum(seconds - measured.step for seconds in measured.steps[:FIRST_STEPS] if seconds > measured.step)
    found = _together(
        *(config.train, first_step, held_out, "measured", measured.step, evaluations),
        *(measured.save_stall, measured.save - measured.save_stall, measured.start + first),
    )
    found["measured_steps"] = list(measured.steps)
    found["loading_seconds_per_step"] = measured.loading
    found["peak_bytes"] = measured.peak_bytes
    return found


def _together(
    train: TrainConfig,
    first_step: int,
    held_out: int,
    source: str,
    step: float,
    evaluations: list[float],
    stall: float,
    last_save: float,
    start: float,
) -> dict[str, Any]:
    """Seconds by part. ``evaluations``: of the first and of a later one; the last save is waited for: ``last_save``."""
    steps, saves = max(train.steps - first_step, 0), count_saves(train, first_step)
    number = count_evaluations(train, first_step) if held_out else 0
    evaluating = 0.0
    if number and evaluations:
        evaluating = number * evaluations[-1] + (evaluations[0] - evaluations[-1] if first_step == 0 else 0.0)
    parts = {"start": start, "steps": steps * step, "evaluations": evaluating, "saves": saves * stall + last_save}
    return {
        "source": source,
        "step_seconds": step,
        "steps": steps,
        "evaluations": number,
        "saves": saves,
        "seconds": parts,
        "total_seconds": sum(parts.values()),
    }
