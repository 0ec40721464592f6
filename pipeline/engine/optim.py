"""Parameter groups, learning-rate schedule and AdamW of the recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from pipeline.config.options import OptimConfig

GROUPS = ("rest", "cross", "head")
TOWER = "net.vision."  # how the names of the vision tower's parameters begin, in every objective


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

    Where the vision tower has a multiplier of its own, its parameters are in groups of their own, multiplied by both.
    Each group carries its name and ``lr_mult``; empty groups are left out. Raises ValueError for an unknown group.
    """
    towers = (False,) if optim.lr_mult_vision == 1 else (False, True)
    multipliers = {"rest": 1.0, "cross": optim.lr_mult_cross, "head": optim.lr_mult_head}
    members: dict[tuple[str, bool, bool], list[nn.Parameter]] = {
        (group, decayed, in_tower): [] for in_tower in towers for group in GROUPS for decayed in (True, False)
    }
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        group = group_of(name)
        if group not in multipliers:
            raise ValueError(f"parameter {name} is in group {group!r}; expected one of {', '.join(GROUPS)}")
        members[group, bool(decays(name, parameter)), len(towers) == 2 and name.startswith(TOWER)].append(parameter)
    return [
        {
            "params": parameters,
            "name": f"{group}{'_vision' if in_tower else ''}{'' if decayed else '_no_decay'}",
            "lr_mult": multipliers[group] * (optim.lr_mult_vision if in_tower else 1.0),
            "lr": 0.0,
            "weight_decay": optim.weight_decay if decayed else 0.0,
        }
        for (group, decayed, in_tower), parameters in members.items()
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
