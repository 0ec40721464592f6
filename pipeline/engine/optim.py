"""Parameter groups, learning-rate schedule and AdamW of the recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from pipeline.config.options import OptimConfig

GROUPS = ("rest", "cross", "head")


def learning_rate(step: int, total_steps: int, optim: OptimConfig) -> float:
    """Base learning rate of step ``step`` (0-based): from 0 up to the peak, then down to ``end_lr`` at ``total_steps``.

    The first step runs at 0, as in the published recipe (spec of FLM, section 7).
    """
    warmup = round(total_steps * optim.warmup_fraction)
    if step < warmup:
        return optim.learning_rate * step / warmup
    if optim.schedule == "constant":
        return optim.learning_rate
    progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
    remaining = 1.0 - progress if optim.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return optim.end_lr + (optim.learning_rate - optim.end_lr) * remaining


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    group_of: Callable[[str], str],
    decays: Callable[[str, nn.Parameter], bool],
    optim: OptimConfig,
) -> list[dict]:
    """Every trainable parameter in exactly one of six groups: (rest, cross, head) x (decayed, not decayed).

    Each group carries its name and ``lr_mult``; empty groups are left out. Raises ValueError for an unknown group.
    """
    multipliers = {"rest": 1.0, "cross": optim.lr_mult_cross, "head": optim.lr_mult_head}
    members: dict[tuple[str, bool], list[nn.Parameter]] = {(g, d): [] for g in GROUPS for d in (True, False)}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        group = group_of(name)
        if group not in multipliers:
            raise ValueError(f"parameter {name} is in group {group!r}; expected one of {', '.join(GROUPS)}")
        members[group, bool(decays(name, parameter))].append(parameter)
    return [
        {
            "params": parameters,
            "name": f"{group}{'' if decayed else '_no_decay'}",
            "lr_mult": multipliers[group],
            "lr": 0.0,
            "weight_decay": optim.weight_decay if decayed else 0.0,
        }
        for (group, decayed), parameters in members.items()
        if parameters
    ]


def set_learning_rate(groups: Iterable[dict], base: float) -> None:
    for group in groups:
        group["lr"] = base * group["lr_mult"]


def build_adamw(groups: list[dict], optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW with one fused kernel per group, on CUDA and CPU alike; no extension is compiled.

    NOTE paper: decay is applied after the update (Hugging Face's AdamW); here: before it, as torch does, because the
    two differ by one step's learning rate only.
    """
    return torch.optim.AdamW(groups, lr=0.0, betas=tuple(optim.betas), eps=optim.eps, fused=True)
