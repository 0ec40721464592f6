"""Which patches of an image the connector of EVLGen merges into one token."""

from __future__ import annotations

import torch
from torch import Tensor

from model.evlgen import EVLGen
from model.merge.apply import membership
from model.merge.schedule import tokens_after
from model.vision.tower import Grid


@torch.no_grad()
def patch_groups(net: EVLGen, images: Tensor, grid: Grid) -> list[tuple[Tensor, int]]:
    """Of each layer or round of merges the number of the token that each cell of the grid is part of, int64 [cells],
    and how many tokens are left.

    ``images`` are one sample, uint8 [1, I, 3, S, S]; frames of a clip have one grid. ``net`` is in evaluation mode and
    merges tokens (``net.connector.merges``).
    """
    plans = net.connector.trace(net.features(images)).plans
    num_tokens = net.vision.num_tokens
    left = tokens_after(num_tokens, [0 if plan is None else plan.merged.shape[1] for plan in plans])
    cells = [membership(plans[: layer + 1], 1, num_tokens)[0, grid.leading :] for layer in range(len(plans))]
    return list(zip(cells, left, strict=True))
