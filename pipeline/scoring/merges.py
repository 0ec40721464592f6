"""Pictures of what a connector merges: the image after some of its layers, patches of one token in one colour."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from model.evlgen import EVLGen
from model.merge_maps import patch_groups
from model.vision.tower import Grid
from pipeline.tasks.captioning import thumbnail

SHOWN_LAYERS = 4
NOTE = "merging: each patch in the mean colour of all patches that its token stands for"


@torch.no_grad()
def merge_pictures(net: nn.Module, image: Tensor, grid: Grid | None) -> list[dict[str, Any]]:
    """The image uint8 [3, S, S] after some layers, evenly chosen, the last among them: layer, tokens and thumbnail.

    None for a network that merges no tokens, or whose tokens stand nowhere known.
    """
    if grid is None or not isinstance(net, EVLGen) or not net.connector.merges:
        return []
    device = next(net.connector.parameters()).device
    groups_of = patch_groups(net, image[None, None].to(device), grid)
    patches = _patches(image, grid)
    found = []
    for layer in _chosen(len(groups_of)):
        groups, left = groups_of[layer]
        shown = _in_groups(patches, groups.cpu(), left).unflatten(0, (grid.height, grid.width))
        pixels = torch.nn.functional.interpolate(shown.permute(2, 0, 1)[None], size=image.shape[1:], mode="nearest")
        picture = pixels[0].round().to(torch.uint8)
        found.append({"layer": layer + 1, "tokens": left, "thumbnail": thumbnail(picture)})
    return found


def _chosen(num_layers: int) -> list[int]:
    shown = min(SHOWN_LAYERS, num_layers)
    return [(number + 1) * num_layers // shown - 1 for number in range(shown)]


def _patches(image: Tensor, grid: Grid) -> Tensor:
    """The mean colour of each cell of the grid, fp32 [cells, 3]."""
    return torch.nn.functional.adaptive_avg_pool2d(image.float(), (grid.height, grid.width)).flatten(1).T


def _in_groups(patches: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """The mean colour of the cells of a cell's group, fp32 [cells, 3]."""
    sums = torch.zeros(num_groups, 3).index_add_(0, groups, patches)
    counts = torch.zeros(num_groups).index_add_(0, groups, torch.ones(len(groups)))
    return (sums / counts.clamp(min=1)[:, None])[groups]
