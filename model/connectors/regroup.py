"""Fewer tokens of an image by the grid that they stand on, without a parameter: means over areas, stacks of neighbours.

Legend: B images, P image tokens, W their channels, Q groups.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor, nn

from model.vision.tower import Grid

LONGEST_SIDE = 2.5  # of an area that a mean is taken over, times its shorter one


class Pooling(nn.Module):
    """The mean of each of Q areas of the grid, which have about the same size; tokens that stand nowhere are left out.

    The areas are rectangles as near to squares as the divisors of Q let them be.
    """

    def __init__(self, grid: Grid, num_tokens: int) -> None:
        """Raises ValueError where the areas would be long and narrow, or smaller than a cell."""
        super().__init__()
        self.grid, self.rows_and_columns = grid, _rows_and_columns(grid, num_tokens)
        if self.rows_and_columns is None:
            possible = [n for n in range(1, grid.height * grid.width + 1) if _rows_and_columns(grid, n)]
            raise _refusal("pooling", grid, num_tokens, possible)

    def width(self, tower_width: int) -> int:
        return tower_width

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, P, W] -> [B, Q, W]."""
        return F.adaptive_avg_pool2d(_map(tokens, self.grid), self.rows_and_columns).flatten(2).mT


class PixelShuffle(nn.Module):
    """Squares of s*s neighbours side by side, as one token of s*s*W channels; as Pooling without single ones."""

    def __init__(self, grid: Grid, num_tokens: int) -> None:
        """Raises ValueError where no s gives Q tokens."""
        super().__init__()
        height, width = grid.height, grid.width
        sides = {
            height * width // side**2: side
            for side in range(1, min(height, width) + 1)
            if height % side == width % side == 0
        }
        if num_tokens not in sides:
            raise _refusal("pixel_shuffle", grid, num_tokens, sides)
        self.grid, self.side, self.num_tokens = grid, sides[num_tokens], num_tokens

    def width(self, tower_width: int) -> int:
        return tower_width * self.side**2

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, P, W] -> [B, Q, s*s*W]."""
        return F.pixel_unshuffle(_map(tokens, self.grid), self.side).flatten(2).mT


def _map(tokens: Tensor, grid: Grid) -> Tensor:
    """[B, P, W] -> [B, W, height, width]."""
    return tokens[:, grid.leading :].mT.unflatten(2, (grid.height, grid.width))


def _rows_and_columns(grid: Grid, num_tokens: int) -> tuple[int, int] | None:
    """Those that divide the grid into areas as square as can be, none if all are longer than ``LONGEST_SIDE`` times."""
    possible = {}
    for rows in range(1, min(grid.height, num_tokens) + 1):
        columns = num_tokens // rows
        if rows * columns == num_tokens and columns <= grid.width:
            height, width = grid.height / rows, grid.width / columns
            possible[max(height / width, width / height)] = (rows, columns)
    longest = min(possible, default=LONGEST_SIDE + 1)
    return possible[longest] if longest <= LONGEST_SIDE else None


def _refusal(name: str, grid: Grid, wanted: int, possible: Iterable[int]) -> ValueError:
    nearest = sorted(sorted(possible, key=lambda number: abs(number - wanted))[:3])
    return ValueError(
        f"model.connector.name {name} can't make {wanted} tokens of a grid of {grid.height}x{grid.width};"
        f" set model.connector.num_tokens to {' or '.join(map(str, nearest))}"
    )
