"""How long a run takes, against a loop that does what training does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.options import Config, TrainConfig
from pipeline.dry_run.duration import FIRST_STEPS, Measured, as_measured, at_rate, count_evaluations
from pipeline.dry_run.run_folder import count_saves


def walked(train: TrainConfig, first_step: int) -> tuple[int, int]:
    """Evaluations and saves of a run from ``first_step`` on, step by step."""
    if first_step >= train.steps:
        return 0, 0
    evaluations, saves = int(first_step == 0), 0
    for step in range(first_step + 1, train.steps + 1):
        is_last = step == train.steps
        evaluations += is_last or (train.eval_every > 0 and step % train.eval_every == 0)
        saves += is_last or (train.save_every > 0 and step % train.save_every == 0)
    return evaluations, saves


@given(st.integers(1, 60), st.integers(0, 12), st.integers(0, 12), st.integers(0, 60))
def test_evaluations_and_saves_are_those_of_the_loop(steps: int, evaluate: int, save: int, first_step: int) -> None:
    train = TrainConfig(steps=steps, eval_every=evaluate, save_every=save)
    first_step = min(first_step, steps)
    assert (count_evaluations(train, first_step), count_saves(train, first_step)) == walked(train, first_step)


def config(**train: int) -> Config:
    found = Config()
    found.optim.batch_size = 10
    found.train = TrainConfig(**{"steps": 100, "eval_every": 50, "save_every": 25, "eval_samples": 60} | train)
    return found


def test_at_a_rate() -> None:
    found = at_rate(config(), 0, 1000, samples_per_second=20.0, source="given")
    assert found["step_seconds"] == 0.5
    assert found["seconds"]["steps"] == 50.0
    assert found["seconds"]["evaluations"] == pytest.approx(3 * 60 / 60)  # 60 samples at a third of 1/20 s each
    assert at_rate(config(), 40, 0, samples_per_second=20.0, source="given")["total_seconds"] == 30.0


def measured(loading: float | None = None) -> Measured:
    steps = (9.0, 3.0, *[1.0, 2.0, 3.0])
    assert FIRST_STEPS == 2
    return Measured(30.0, steps, (8.0, 5.0), save=4.0, save_stall=1.0, loading=loading, peak_bytes=1)


def test_as_measured() -> None:
    found = as_measured(config(), 0, 1000, measured())
    assert found["step_seconds"] == 2.0
    own = {"start": 30.0 + 7.0 + 1.0, "steps": 200.0, "evaluations": 1.2 * (8.0 + 5.0 + 5.0), "saves": 4 * 1.0 + 3.0}
    assert found["seconds"] == pytest.approx(own)  # 60 samples are held out for the 50 of 5 steps
    assert found["total_seconds"] == pytest.approx(sum(own.values()))


def test_loaders_that_do_not_keep_up_set_the_pace() -> None:
    assert as_measured(config(), 0, 0, measured(loading=2.5))["step_seconds"] == 2.5
    assert as_measured(config(), 0, 0, measured(loading=0.5))["step_seconds"] == 2.0
