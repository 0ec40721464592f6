"""What the frames of a video tell each other inside a vision tower (EVLGen, section 6 of its specification).

In every block, after its attention among the tokens of a frame, each token attends to those at its own place in all
frames of the video. What it finds is added through a weight that begins at 0, so that the tower begins as it was.

Legend: B videos, F frames, P tokens of a frame, W their width, D hidden width, H heads.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import merge_heads, split_heads

HEADS, HIDDEN_WIDTH = 8, 256
FASTEST_PERIOD, SLOWEST_PERIOD = 2 * math.pi, 10_000.0  # frames, of the positions' sines


class ReleasedTemporalAttention(nn.Module):
    """As the release: the tokens themselves are what is mixed, and no token knows which frame it is of.

    # NOTE paper: v + softmax(q k) v. Release, and here: eight heads, a scale of 1/16 whatever their width, a gate.
    """

    def __init__(self, width: int) -> None:
        """Raises ValueError for a width that is no multiple of the heads."""
        super().__init__()
        _check(width)
        self.query = nn.Linear(width, HIDDEN_WIDTH)
        self.key = nn.Linear(width, HIDDEN_WIDTH)
        self.alpha = nn.Parameter(torch.zeros(()))
        _initialise(self.query, self.key)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one token; what it compares with other frames is left out, F * (256 + W)."""
        return self.query.weight.numel() + self.key.weight.numel()

    def forward(self, tokens: Tensor, num_frames: int) -> Tensor:
        """[B*F, P, W] -> [B*F, P, W]; an order of the frames makes no difference."""
        places = _by_place(tokens, num_frames)
        query, key, value = (split_heads(part, HEADS)[0] for part in (self.query(places), self.key(places), places))
        mixed = F.scaled_dot_product_attention(query, key, value, scale=HIDDEN_WIDTH**-0.5)
        return tokens + self.alpha * _by_frame(merge_heads(mixed), tokens)


class OrderedTemporalAttention(nn.Module):
    """The same for tokens that know their frame: norm, positions of the frames, values, scale by a head's width.

    The gate is a projection that begins at 0.
    """

    def __init__(self, width: int) -> None:
        """Raises ValueError for a width that is no multiple of the heads."""
        super().__init__()
        _check(width)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * HIDDEN_WIDTH)
        self.out = nn.Linear(HIDDEN_WIDTH, width)
        _initialise(self.qkv)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one token; what it compares with other frames is left out, 2 * 256 * F."""
        return self.qkv.weight.numel() + self.out.weight.numel()

    def forward(self, tokens: Tensor, num_frames: int) -> Tensor:
        """[B*F, P, W] -> [B*F, P, W]."""
        places = self.norm(_by_place(tokens, num_frames))
        places = places + frame_positions(num_frames, places.shape[-1], places.device).to(places.dtype)
        mixed = F.scaled_dot_product_attention(*split_heads(self.qkv(places), HEADS, 3))
        return tokens + _by_frame(self.out(merge_heads(mixed)), tokens)


TEMPORAL = {"released": ReleasedTemporalAttention, "ordered": OrderedTemporalAttention}


def frame_positions(num_frames: int, width: int, device: torch.device) -> Tensor:
    """Sines and cosines of the frames' numbers, fp32 [F, W] (W even), periods from 2 pi to 10,000 frames.

    Vaswani et al. 2017, section 3.5.
    """
    steps = torch.linspace(0, 1, width // 2, device=device)
    periods = FASTEST_PERIOD * (SLOWEST_PERIOD / FASTEST_PERIOD) ** steps
    angles = 2 * math.pi * torch.arange(num_frames, device=device)[:, None] / periods
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _by_place(tokens: Tensor, num_frames: int) -> Tensor:
    """[B*F, P, W] -> [B*P, F, W]."""
    return tokens.unflatten(0, (-1, num_frames)).transpose(1, 2).flatten(0, 1)


def _by_frame(places: Tensor, like: Tensor) -> Tensor:
    """[B*P, F, W] -> [B*F, P, W], the shape of ``like``."""
    return places.unflatten(0, (-1, like.shape[1])).transpose(1, 2).reshape(like.shape)


def _check(width: int) -> None:
    if width % (2 * HEADS):
        raise ValueError(f"model.vision.width {width} is not a multiple of {2 * HEADS}, as model.vision.temporal needs")


def _initialise(*linears: nn.Linear) -> None:
    for linear in linears:
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
