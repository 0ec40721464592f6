"""Decides whether a step is bad, by comparing its loss and gradient norm with running statistics; plain arithmetic.

Every rank passes the same numbers and gets the same verdict. The state is part of RunState, so that a resumed run
decides as an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config.options import GuardConfig

LEAST_LOSS_DEVIATION = 0.05  # floor of the standard deviation, as a share of the mean loss
LEAST_LOG_NORM_DEVIATION = 0.25  # floor for the logarithm of the norm: 8 deviations are at least a factor of 7


@dataclass(frozen=True)
class Verdict:
    """The guard's decision on one step: ``reason`` is None for a good step, ``thresholds`` are None during warm-up."""

    reason: str | None
    thresholds: dict[str, float | None]


class RunningStatistics:
    """Exponential moving mean and variance over ``memory`` values; plain averages until there are that many."""

    def __init__(self, memory: int, state: Mapping[str, Any] | None = None) -> None:
        self._memory = memory
        state = state or {}
        self.count, self.mean, self.variance = (
            int(state.get("count", 0)),
            float(state.get("mean", 0.0)),
            float(state.get("variance", 0.0)),
        )

    def add(self, value: float) -> None:
        self.count += 1
        share = 1.0 / min(self.count, self._memory)
        distance = value - self.mean
        self.mean += share * distance
        self.variance = (1.0 - share) * (self.variance + share * distance * distance)

    def state(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "variance": self.variance}


class Guard:
    """Running statistics of good steps, and the bad steps of the last ``window_steps``."""

    def __init__(self, settings: GuardConfig, state: Mapping[str, Any] | None = None) -> None:
        state = state or {}
        self._settings = settings
        self._loss = RunningStatistics(settings.memory_steps, state.get("loss"))
        self._log_norm = RunningStatistics(settings.memory_steps, state.get("log_grad_norm"))
        self.recent: list[int] = list(state.get("recent", ()))  # bad steps, oldest first
        self.saved_for: int | None = state.get("saved_for")  # last bad step for which a checkpoint was made
        self.untouched_since: int | None = state.get("untouched_since")  # weights are those of this checkpoint's step

    def state(self) -> dict[str, Any]:
        """A copy fit for JSON, which ``Guard(settings, state)`` continues from."""
        return {
            "loss": self._loss.state(),
            "log_grad_norm": self._log_norm.state(),
            "recent": list(self.recent),
            "saved_for": self.saved_for,
            "untouched_since": self.untouched_since,
        }

    def judge(self, step: int, loss: float, grad_norm: float | None) -> Verdict:
        """Judge step ``step`` (0-based); a good one joins the statistics, a bad one the recent bad steps."""
        verdict = Verdict(self._reason(loss, grad_norm), self.thresholds())
        if verdict.reason is None:
            self._loss.add(loss)
            if grad_norm:  # 0 has no logarithm
                self._log_norm.add(math.log(grad_norm))
            self.untouched_since = None
        else:
            self.recent = [bad for bad in self.recent if bad > step - self._settings.window_steps] + [step]
        return verdict

    def thresholds(self) -> dict[str, float | None]:
        """The largest loss and gradient norm of a good step; None while or where spikes are not judged."""
        settings, loss, norm = self._settings, self._loss, self._log_norm
        result: dict[str, float | None] = {"loss": None, "grad_norm": None}
        if settings.loss_sigmas and loss.count >= max(settings.warmup_steps, 2):
            deviation = max(math.sqrt(loss.variance), LEAST_LOSS_DEVIATION * abs(loss.mean))
            result["loss"] = loss.mean + settings.loss_sigmas * deviation
        if settings.grad_norm_sigmas and norm.count >= max(settings.warmup_steps, 2):
            deviation = max(math.sqrt(norm.variance), LEAST_LOG_NORM_DEVIATION)
            result["grad_norm"] = math.exp(min(norm.mean + settings.grad_norm_sigmas * deviation, 700.0))
        return result

    @property
    def over_quota(self) -> bool:
        """Whether there are more recent bad steps than ``guard.max_skips``."""
        return len(self.recent) > self._settings.max_skips

    def wants_checkpoint(self, step: int) -> bool:
        """Whether to save a checkpoint for the replay of the bad step ``step`` (``guard.save_incident_every``)."""
        every = self._settings.save_incident_every
        return every > 0 and (self.saved_for is None or step >= self.saved_for + every)

    def _reason(self, loss: float, grad_norm: float | None) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is not finite ({loss})"
        if grad_norm is not None and not math.isfinite(grad_norm):
            return "the gradient is not finite"
        thresholds = self.thresholds()
        for name, words, value in (("loss", "loss", loss), ("grad_norm", "gradient norm", grad_norm)):
            limit = thresholds[name]
            if limit is not None and value is not None and value > limit:
                return f"the {words} {value:.6g} is above {limit:.6g}, the most that is usual here"
        return None
