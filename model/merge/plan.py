"""Which tokens of an image become one: bipartite matching of similar tokens (EVLGen, section 3.3 of its specification).

Tokens at even positions may be merged into tokens at odd positions, each into the one that resembles it most. Of all
these pairs the most similar ones are merged. What is decided here is carried out in :mod:`model.merge.apply`.

Legend: B images, T tokens before the merge, M merges, N = T - M tokens after it, C channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class MergePlan(NamedTuple):
    """A merge of T tokens into N, as many in every image."""

    kept: Tensor  # int64 [B, N]: the token at each place after the merge, by its place before it
    merged: Tensor  # int64 [B, M]: the tokens that go, by their place before the merge, most similar first
    into: Tensor  # int64 [B, M]: the place after the merge of the token that takes each of them up

    def destinations(self) -> Tensor:
        """The place after the merge of every token, int64 [B, T]."""
        num_images, num_kept = self.kept.shape
        places = self.kept.new_empty(num_images, num_kept + self.merged.shape[1])
        places.scatter_(1, self.kept, torch.arange(num_kept, device=places.device).expand_as(self.kept))
        return places.scatter_(1, self.merged, self.into)


def most_merges(num_tokens: int, protect_first: bool = True) -> int:
    """How many of ``num_tokens`` one merge can take away: those at even positions, but for a protected first."""
    return (num_tokens - protect_first) // 2


@torch.no_grad()
def bipartite_plan(metric: Tensor, num_merges: int, protect_first: bool = True) -> MergePlan | None:
    """The merge of the ``num_merges`` most similar pairs, or of as many as there can be; None where that is none.

    After the merge come the even tokens that stay, then the odd ones, both in their order; as in the release, where
    nothing is protected, the even ones in the order in which they would have been merged next. Similarity is
    the cosine in fp32, whatever dtype ``metric`` has; a token without length resembles every other by 0. Of equal
    similarities the earlier position comes first, so the plan is the same on every device where no two are closer
    than rounding.

    Args:
        metric: [B, T, C], by what tokens are compared.
        num_merges: of each image.
        protect_first: the first token (class token) is not merged. It stands at an even position, so none is merged
            into it either.
    """
    num_tokens = metric.shape[1]
    num_merges = min(num_merges, most_merges(num_tokens, protect_first))
    if num_merges <= 0:
        return None
    metric = F.normalize(metric.float(), dim=-1)
    similarity = metric[:, 0::2] @ metric[:, 1::2].mT
    if protect_first:
        similarity[:, 0] = -torch.inf
    best, nearest = similarity.max(dim=-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    merged, stay = order[:, :num_merges], order[:, num_merges:]
    if protect_first:
        stay = stay.sort(dim=-1).values
    odd = torch.arange(1, num_tokens, 2, device=metric.device).expand(len(metric), -1)
    return MergePlan(
        kept=torch.cat([2 * stay, odd], dim=1),
        merged=2 * merged,
        into=stay.shape[1] + nearest.gather(1, merged),
    )
