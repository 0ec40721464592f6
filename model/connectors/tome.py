"""Fewer tokens of an image by merging those that resemble each other, without a parameter.

Bolya et al. 2023, "Token Merging" (arXiv 2210.09461), section 3, on the tokens that a tower gives.
Legend: B images, T tokens that come in, N tokens that are left, W their channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.merge.apply import merge_mean, merge_weighted
from model.merge.plan import MergePlan, bipartite_plan


class Merged(NamedTuple):
    """What is left of an image's tokens, and how it came about."""

    tokens: Tensor  # [B, N, D]
    sizes: Tensor | None  # fp32 [B, N], how many tokens that came in each stands for; None where that is not counted
    plans: tuple[MergePlan | None, ...]  # of each layer or round


class TokenMerging(nn.Module):
    """Rounds of merges of the tokens themselves; what is left stands in the order of the image, by the mean place.

    With ``weighted`` merging a mean counts a token as many times as there are tokens in it.
    """

    def __init__(self, weighted: bool) -> None:
        super().__init__()
        self.weighted = weighted

    def width(self, tower_width: int) -> int:
        return tower_width

    def forward(self, tokens: Tensor, merges: Sequence[int], protect_first: bool) -> Merged:
        """[B, T, W], the number of merges of each round -> [B, N, W]; a protected first (class) token stays alone."""
        num_images, num_tokens, _ = tokens.shape
        place = torch.arange(num_tokens, dtype=torch.float32, device=tokens.device).expand(num_images, -1)[..., None]
        sizes = torch.ones_like(place[..., 0])
        plans = []
        for number in merges:
            plan = bipartite_plan(tokens, number, protect_first)
            place, merged_sizes = merge_weighted(place, sizes, plan)
            tokens = merge_weighted(tokens, sizes, plan)[0] if self.weighted else merge_mean(tokens, plan)
            sizes = merged_sizes
            plans.append(plan)
        order = place[..., 0].argsort(dim=1, stable=True)
        tokens = tokens.gather(1, order[..., None].expand_as(tokens))
        return Merged(tokens, sizes.gather(1, order) if self.weighted else None, tuple(plans))
