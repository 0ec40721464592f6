"""Reconstructor: queries that read both text streams and never each other (specification section 2.5).

Legend: Q queries, S packed stream states, D width, R rows, T padded length.
"""

from __future__ import annotations

from torch import Tensor, nn

from model.config import TextConfig
from model.layers import CrossAttention, FeedForward, Packing, ResidualNorm
from model.text import TOP_EPS


class ReconstructorLayer(nn.Module):
    """Cross-attention from the queries to the states of both streams, then feed-forward; no self-attention."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.cross_attention = CrossAttention(config.width, config.heads, config.dropout)
        self.cross_residual = ResidualNorm(config.width, TOP_EPS, config.dropout)
        self.ffn = FeedForward(config.width, config.ffn_width, TOP_EPS, config.dropout)

    def forward(
        self, queries: Tensor, query_packing: Packing, streams: Tensor, side_by_side: Packing, mask: Tensor
    ) -> Tensor:
        """queries [Q, D], streams [S, D] (outputs of its text layer), mask bool [R, 1, T, 2T] -> [Q, D]."""
        update = self.cross_attention.to_streams(queries, query_packing, streams, side_by_side, mask)
        return self.ffn(self.cross_residual(update, queries))
