"""Attention and feed-forward blocks on packed text, written for post-LN BERT layers.

Legend: S packed states, Q packed queries, K packed keys, D width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Reading
from model.dropout import dropout_add


class SelfAttention(nn.Module):
    """Attention over text; returns the output projection, without residual."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, states: Tensor, reading: Reading) -> Tensor:
        """states [S, D] -> [S, D]."""
        return self.out(reading(self.qkv(states), None, self.num_heads, self.dropout if self.training else 0.0))


class CrossAttention(nn.Module):
    """Attention from packed queries to a context whose keys and values are computed once."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, queries: Tensor, context: Tensor, reading: Reading) -> Tensor:
        """queries [Q, D], context [K, D] (text states of all streams, or the tokens of all images) -> [Q, D]."""
        rate = self.dropout if self.training else 0.0
        return self.out(reading(self.query(queries), self.key_value(context), self.num_heads, rate))


class ResidualNorm(nn.Module):
    """LN(dropout(update) + states), the post-LN residual of BERT."""

    def __init__(self, width: int, eps: float, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps)
        self.dropout = dropout

    def forward(self, update: Tensor, states: Tensor) -> Tensor:
        return self.norm(dropout_add(update, states, self.dropout if self.training else 0.0))


class FeedForward(nn.Module):
    """Linear, exact GELU, linear, then the post-LN residual."""

    def __init__(self, width: int, ffn_width: int, eps: float, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(width, ffn_width)
        self.down = nn.Linear(ffn_width, width)
        self.residual = ResidualNorm(width, eps, dropout)

    def forward(self, states: Tensor) -> Tensor:
        return self.residual(self.down(F.gelu(self.up(states))), states)
