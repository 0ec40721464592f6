"""Carries merges of tokens out: means of what is merged, how many patches a token stands for, which ones.

Legend: B images, T tokens before the merge, N after it, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model.merge.plan import MergePlan


def merge_mean(tokens: Tensor, plan: MergePlan | None) -> Tensor:
    """The plain mean of the tokens that become one, whatever they stand for themselves: [B, T, D] -> [B, N, D].

    This is what the release of EVLGen computes; ``None`` merges nothing.
    """
    if plan is None:
        return tokens
    return _sum(tokens, plan) / _sum(torch.ones_like(tokens[..., :1]), plan)


def merge_weighted(tokens: Tensor, sizes: Tensor, plan: MergePlan | None) -> tuple[Tensor, Tensor]:
    """The mean of all patches behind the tokens that become one, and how many these are.

    Args:
        tokens: [B, T, D].
        sizes: fp32 [B, T], how many patches each token stands for.

    Returns:
        [B, N, D] in the dtype of ``tokens``, and fp32 [B, N]; the sums of sizes * tokens and of sizes stay as they are.
    """
    if plan is None:
        return tokens, sizes
    merged_sizes = merge_sizes(sizes, plan)
    weighted = _sum(tokens.float() * sizes[..., None], plan) / merged_sizes[..., None]
    return weighted.to(tokens.dtype), merged_sizes


def merge_sizes(sizes: Tensor, plan: MergePlan | None) -> Tensor:
    """How many patches the tokens after a merge stand for: [B, T] -> [B, N]."""
    return sizes if plan is None else _sum(sizes[..., None], plan)[..., 0]


def membership(plans: Sequence[MergePlan | None], num_images: int, num_tokens: int) -> Tensor:
    """In which token each of the first ``num_tokens`` ended after all ``plans``, one upon the other: int64 [B, T]."""
    device = next((plan.kept.device for plan in plans if plan is not None), None)
    places = torch.arange(num_tokens, device=device).expand(num_images, -1)
    for plan in plans:
        if plan is not None:
            places = plan.destinations().gather(1, places)
    return places


def _sum(tokens: Tensor, plan: MergePlan) -> Tensor:
    """[B, T, D] -> [B, N, D], the sums of the tokens that become one.

    By a product with ones and zeros, which has one order of additions; scattering has another in every run on a GPU.
    """
    kept, merged = (tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2])) for index in plan[:2])
    goes_into = F.one_hot(plan.into, kept.shape[1]).to(tokens.dtype)
    return torch.baddbmm(kept, goes_into.mT, merged)
