"""The guard: what it calls a bad step, what it forgets, and that its state is the whole of it."""

from __future__ import annotations

import json
import math
import random
import statistics

import pytest

from pipeline.config.options import GuardConfig
from pipeline.incidents.guard import Guard, RunningStatistics


def warm(settings: GuardConfig, steps: int = 200, seed: int = 1) -> Guard:
    """A guard that has seen steps of an ordinary run: a falling noisy loss, gradient norms within a factor of two."""
    draw = random.Random(seed)
    guard = Guard(settings)
    for step in range(steps):
        loss = 6 * math.exp(-step / 150) + 2 + draw.gauss(0, 0.2)
        assert guard.judge(step, loss, math.exp(draw.gauss(0, 0.4))).reason is None, step
    return guard


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_bad_from_the_first_step(value: float) -> None:
    assert "loss is not finite" in Guard(GuardConfig()).judge(0, value, 1.0).reason
    assert "gradient is not finite" in Guard(GuardConfig()).judge(0, 1.0, value).reason


def test_spikes_are_judged_after_the_warm_up_only() -> None:
    guard = Guard(GuardConfig(warmup_steps=50))
    for step in range(50):
        assert guard.thresholds() == {"loss": None, "grad_norm": None}
        assert guard.judge(step, 3.0, 1.0).reason is None
    assert guard.judge(50, 3.0, 1000.0).reason.startswith("the gradient norm 1000 is above")
    assert guard.judge(51, 30.0, 1.0).reason.startswith("the loss 30 is above")
    assert guard.judge(52, 3.1, 2.0).reason is None


def test_an_ordinary_run_has_no_bad_step_and_a_spike_leaves_no_trace() -> None:
    guard = warm(GuardConfig())
    before = guard.state()
    assert guard.judge(200, 3.0, 1e4).reason is not None
    after = guard.state()
    assert (after["loss"], after["log_grad_norm"]) == (before["loss"], before["log_grad_norm"])
    assert after["recent"] == [200]


def test_spikes_can_be_switched_off() -> None:
    guard = warm(GuardConfig(loss_sigmas=0, grad_norm_sigmas=0))
    assert guard.judge(200, 1e6, 1e6).reason is None
    assert guard.judge(201, math.nan, 1.0).reason is not None


def test_statistics_are_plain_averages_until_memory_is_full() -> None:
    values = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0]
    running = RunningStatistics(memory=10)
    for value in values:
        running.add(value)
    assert running.mean == pytest.approx(statistics.fmean(values))
    assert running.variance == pytest.approx(statistics.pvariance(values))
    for _ in range(200):
        running.add(7.0)
    assert running.mean == pytest.approx(7.0, abs=1e-6) and running.variance < 1e-6


def test_quota_counts_the_window_only() -> None:
    guard = Guard(GuardConfig(max_skips=2, window_steps=10))
    for step in (0, 5, 11):
        guard.judge(step, math.nan, 1.0)
        assert not guard.over_quota
    guard.judge(12, math.nan, 1.0)
    assert guard.recent == [5, 11, 12] and guard.over_quota
    guard.judge(40, math.nan, 1.0)
    assert guard.recent == [40] and not guard.over_quota


def test_checkpoints_for_incidents_are_spaced() -> None:
    guard = Guard(GuardConfig(save_incident_every=100))
    assert guard.wants_checkpoint(7)
    guard.saved_for = 7
    assert not guard.wants_checkpoint(106) and guard.wants_checkpoint(107)
    assert not Guard(GuardConfig(save_incident_every=0)).wants_checkpoint(7)


def test_a_guard_that_went_through_json_decides_the_same() -> None:
    """Invariant 2: bit for bit, thresholds included."""
    settings = GuardConfig(warmup_steps=10)
    one = warm(settings, 120, seed=5)
    two = Guard(settings, json.loads(json.dumps(one.state())))
    draw = random.Random(9)
    for step in range(120, 300):
        loss, norm = 4 + draw.gauss(0, 1), math.exp(draw.gauss(0, 1.2))
        assert one.judge(step, loss, norm) == two.judge(step, loss, norm)
    assert one.state() == two.state()
