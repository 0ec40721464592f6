"""Asks whether a step may be taken, once its gradients are whole and before DeepSpeed's optimizer changes anything.

A refused step goes DeepSpeed's own way of leaving out a step whose gradients overflowed: gradients and buffers are
cleared, weights, moments and counters stay, ``skipped_steps`` counts it. Written for DeepSpeed 0.19.8, where the ZeRO
optimizers compute the global norm, call ``_update_scale`` and only then look at ``overflow``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Ask = Callable[[float | None, bool], bool]  # (global gradient norm or None if unknown, overflow) -> may step


class StepVeto:
    """Stands before the optimizer of a DeepSpeed engine; ``ask`` is set for one step and asked exactly once."""

    def __init__(self, optimizer: Any, stage: int) -> None:
        self.ask: Ask | None = None
        self._optimizer = optimizer
        self._norm: float | Tensor | None = None
        if stage == 0:
            self._stand_before_plain_optimizer()
        else:
            self._stand_before_zero_optimizer("_get_norm_groups" if stage == 3 else "scaled_global_norm")

    def ask_at_stage_0(self, norm: Tensor) -> None:
        """To be called with the global norm right before DeepSpeed's step, which would clip before it asks."""
        self._norm = norm
        self._optimizer.overflow = not self._may_step(False)

    def _stand_before_zero_optimizer(self, norm_method: str) -> None:
        optimizer = self._optimizer
        compute_norm, update_scale = getattr(optimizer, norm_method), optimizer._update_scale

        def watched_norm(*arguments: Any) -> Any:
            found = compute_norm(*arguments)
            if self.ask is not None:
                self._norm = _combined(found if isinstance(found, list) else [found])
            return found

        def update_then_ask(overflow: bool = False) -> None:
            update_scale(overflow)  # fp16's scale follows overflow alone, never our refusal
            if not self._may_step(bool(overflow)):
                optimizer.overflow = True

        setattr(optimizer, norm_method, watched_norm)
        optimizer._update_scale = update_then_ask

    def _stand_before_plain_optimizer(self) -> None:
        optimizer = self._optimizer
        take_step = optimizer.step

        def step_unless_refused(*arguments: Any, **options: Any) -> Any:
            return None if optimizer.overflow else take_step(*arguments, **options)

        optimizer.step = step_unless_refused
        optimizer.overflow = False  # DeepSpeed's engine counts a step as left out by this attribute

    def _may_step(self, overflow: bool) -> bool:
        ask, norm = self.ask, self._norm
        self.ask, self._norm = None, None
        if ask is None:  # nobody guards
            return True
        scale = float(getattr(self._optimizer, "loss_scale", 1.0))
        return ask(None if norm is None else float(norm) / scale, overflow)


def _combined(norms: list[float | Tensor]) -> Tensor:
    """The norm over all groups, on the host; infinite where a group's is not finite, which DeepSpeed marks by -1."""
    device = next((norm.device for norm in norms if isinstance(norm, Tensor)), None)
    stacked = torch.stack([torch.as_tensor(norm, dtype=torch.float32, device=device) for norm in norms]).cpu()
    good = bool((torch.isfinite(stacked) & (stacked >= 0)).all())
    return torch.linalg.vector_norm(stacked) if good else torch.tensor(float("inf"))
