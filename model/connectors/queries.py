"""Connectors that read an image's tokens by learned queries: the Q-Former of BLIP-2, the resampler of Flamingo.

Legend: B images, T image tokens, Q queries, D width.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import merge_heads, split_heads
from model.config import ConnectorConfig
from model.dropout import dropout
from model.layers import TOP_EPS, CrossAttention, FeedForward, ResidualNorm, SelfAttention
from model.recomputing import run

READS_EVERY = 2  # layers; the cross_attention_freq of BLIP-2


class TextBeside(NamedTuple):
    """Text that goes through a Q-Former beside its queries, in the same self-attention, in its first stage."""

    states: Tensor  # [B, T, D]
    mask: Tensor  # bool [B, Q + T, Q + T], True = may attend
    layers: nn.ModuleList  # the feed-forward of text, one a layer


class QFormer(nn.Module):
    """BERT layers on learned queries; every second one, from the first on, also attends to the image.

    Li et al. 2023, "BLIP-2", section 3.1. Its layers for text belong to the first stage (:mod:`model.qformer`).
    """

    recompute = False

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.queries = nn.Parameter(torch.empty(config.num_tokens, config.width))
        self.norm = nn.LayerNorm(config.width, eps=TOP_EPS)
        self.layers = nn.ModuleList(QueryLayer(config, number % READS_EVERY == 0) for number in range(config.layers))

    def forward(self, tokens: Tensor, text: TextBeside | None = None) -> Tensor:
        """[B, T, D] -> [B, Q, D]; with ``text`` its states behind them."""
        states = self.norm(self.queries).expand(len(tokens), -1, -1)
        if text is not None:
            states = torch.cat([states, text.states], dim=1)
        if self.training:
            states = dropout(states, self.dropout)
        for number, layer in enumerate(self.layers):
            beside = () if text is None else (text.mask[:, None], text.layers[number], len(self.queries))
            states = run(layer, states, tokens, *beside, recompute=self.recompute and self.training)
        return states

    def macs(self, num_tokens: int, num_words: int = 0) -> int:
        """Multiply-accumulates for an image of so many tokens, with so many of text beside the queries."""
        return sum(layer.macs(len(self.queries), num_tokens, num_words) for layer in self.layers)


class QueryLayer(nn.Module):
    """Self-attention of the queries, cross-attention to the image where it ``reads``, feed-forward; post-LN."""

    def __init__(self, config: ConnectorConfig, reads: bool) -> None:
        super().__init__()
        self.attention = SelfAttention(config.width, config.heads, config.dropout)
        self.residual = ResidualNorm(config.width, TOP_EPS, config.dropout)
        self.cross_attention = CrossAttention(config.width, config.heads, config.dropout) if reads else None
        self.cross_residual = ResidualNorm(config.width, TOP_EPS, config.dropout) if reads else None
        self.ffn = FeedForward(config.width, config.ffn_width, TOP_EPS, config.dropout)

    def forward(
        self,
        states: Tensor,
        tokens: Tensor,
        mask: Tensor | None = None,
        text_ffn: nn.Module | None = None,
        num_queries: int | None = None,
    ) -> Tensor:
        """[B, Q, D], [B, T, D] -> [B, Q, D]; states behind the queries are of text, which ``text_ffn`` is for."""
        states = self.residual(self.attention(states, partial(_attend, mask=mask)), states)
        words = None
        if text_ffn is not None:
            states, words = states[:, :num_queries], text_ffn(states[:, num_queries:])
        if self.cross_attention is not None:
            states = self.cross_residual(self.cross_attention(states, tokens, _attend), states)
        states = self.ffn(states)
        return states if words is None else torch.cat([states, words], dim=1)

    def macs(self, num_queries: int, num_tokens: int, num_words: int = 0) -> int:
        width, hidden = self.ffn.up.in_features, self.ffn.up.out_features
        both = num_queries + num_words
        own = both * (4 * width**2 + 2 * both * width + 2 * width * hidden)
        if self.cross_attention is None:
            return own
        return own + 2 * width**2 * (num_queries + num_tokens) + 2 * num_queries * num_tokens * width


class Perceiver(nn.Module):
    """Pre-LN layers on learned queries, which attend to the image and to each other at once.

    Alayrac et al. 2022, "Flamingo", section 3.1 and figure 5.
    """

    recompute = False

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(config.num_tokens, config.width))
        self.layers = nn.ModuleList(PerceiverLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T, D] -> [B, Q, D]."""
        states = self.queries.expand(len(tokens), -1, -1)
        for layer in self.layers:
            states = run(layer, states, tokens, recompute=self.recompute and self.training)
        return self.norm(states)

    def macs(self, num_tokens: int) -> int:
        """Multiply-accumulates for an image of so many tokens."""
        return sum(layer.macs(len(self.queries), num_tokens) for layer in self.layers)


class PerceiverLayer(nn.Module):
    """Attention to the tokens and the queries, feed-forward, each after its norm and added to what came in."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        width = config.width
        self.dropout = config.dropout
        self.token_norm, self.query_norm, self.ffn_norm = (nn.LayerNorm(width) for _ in range(3))
        self.attention = CrossAttention(width, config.heads, config.dropout)
        self.up = nn.Linear(width, config.ffn_width)
        self.down = nn.Linear(config.ffn_width, width)

    def forward(self, states: Tensor, tokens: Tensor) -> Tensor:
        """[B, Q, D], [B, T, D] -> [B, Q, D]."""
        queries = self.query_norm(states)
        context = torch.cat([self.token_norm(tokens), queries], dim=1)
        states = states + self._drop(self.attention(queries, context, _attend))
        return states + self._drop(self.down(F.gelu(self.up(self.ffn_norm(states)))))

    def _drop(self, update: Tensor) -> Tensor:
        return dropout(update, self.dropout) if self.training else update

    def macs(self, num_queries: int, num_tokens: int) -> int:
        width, num_keys = self.up.in_features, num_queries + num_tokens
        attention = 2 * width**2 * (num_queries + num_keys) + 2 * num_queries * num_keys * width
        return attention + 2 * num_queries * width * self.up.out_features


def _attend(query: Tensor, key_value: Tensor | None, num_heads: int, rate: float, mask: Tensor | None = None) -> Tensor:
    """All queries of an image attend to all keys: [B, Q, D], [B, K, 2D], or [B, Q, 3D] with its own -> [B, Q, D].

    ``mask`` bool [B, 1, Q, K]: to those that it lets them.
    """
    if key_value is None:
        query, key, value = split_heads(query, num_heads, 3)
    else:
        (query,), (key, value) = split_heads(query, num_heads), split_heads(key_value, num_heads, 2)
    return merge_heads(F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=rate))
