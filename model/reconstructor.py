"""Reconstructor: queries that read both text streams and never each other (specification section 2.5).

Legend: Q queries, S packed stream states, D width.
"""

from __future__ import annotations

from torch import Tensor, nn

from model.attention import Reading
from model.config import TextConfig
from model.layers import CrossAttention, FeedForward, ResidualNorm
from model.text import TOP_EPS


class ReconstructorLayer(nn.Module):
    """Cross-attention from the queries to the states of both streams, then feed-forward; no self-attention."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.cross_attention = CrossAttention(config.width, config.heads, config.dropout)
        self.cross_residual = ResidualNorm(config.width, TOP_EPS, config.dropout)
        self.ffn = FeedForward(config.width, config.ffn_width, TOP_EPS, config.dropout)

    def forward(self, queries: Tensor, streams: Tensor, reading: Reading) -> Tensor:
        """queries [Q, D], streams [S, D] (outputs of its text layer) -> [Q, D]."""
        return self.ffn(self.cross_residual(self.cross_attention(queries, streams, reading), queries))
