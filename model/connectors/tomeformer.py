"""TomeFormer: a BERT encoder of image tokens that merges some of them in every layer (EVLGen, specification section 3).

Legend: B images, T tokens that come in, N tokens that are left, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import merge_heads, split_heads
from model.config import ConnectorConfig
from model.connectors.tome import Merged
from model.dropout import dropout
from model.layers import TOP_EPS, FeedForward, ResidualNorm
from model.merge.apply import merge_mean, merge_weighted
from model.merge.plan import MergePlan, bipartite_plan
from model.recomputing import run


class TomeFormer(nn.Module):
    """BERT without words: positions and token type are added to the tokens, each layer merges before its feed-forward.

    With weighted merging a token counts as many times as there are tokens in it, in means and in attention; plain
    merging is the release's.
    """

    recompute = False

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.weighted, self.dropout = config.merging == "weighted", config.dropout
        self.position = nn.Embedding(config.max_positions, config.width)
        self.token_type = nn.Parameter(torch.zeros(config.width))
        self.norm = nn.LayerNorm(config.width, eps=TOP_EPS)
        self.layers = nn.ModuleList(MergingLayer(config) for _ in range(config.layers))

    def begin_as_merging(self) -> None:
        """Make layers merge and normalise only, until training lets them add what they compute.

        From random layers training does not find the image, or late (docs/log.md).
        """
        for layer in self.layers:
            nn.init.zeros_(layer.attention.out.weight)
            nn.init.zeros_(layer.ffn.down.weight)

    def forward(self, tokens: Tensor, merges: Sequence[int], protect_first: bool = True) -> Merged:
        """[B, T, D], the number of merges of each layer -> [B, N, D]; a protected first (class) token is not merged."""
        tokens = self.norm(tokens + self.position.weight[: tokens.shape[1]] + self.token_type)
        if self.training:
            tokens = dropout(tokens, self.dropout)
        sizes = tokens.new_ones(tokens.shape[:2], dtype=torch.float32) if self.weighted else None
        plans = []
        for layer, num_merges in zip(self.layers, merges, strict=True):
            recompute = self.recompute and self.training
            tokens, sizes, plan = run(layer, tokens, sizes, num_merges, protect_first, recompute=recompute)
            plans.append(plan)
        return Merged(tokens, sizes, tuple(plans))

    def macs(self, num_tokens: int, merges: Sequence[int]) -> int:
        """Multiply-accumulates for an image of so many tokens: of its matrix products."""
        total, width = 0, self.position.embedding_dim
        for layer, num_merges in zip(self.layers, merges, strict=True):
            total += num_tokens * (4 * width**2 + 2 * num_tokens * width)
            num_tokens -= num_merges
            total += num_tokens * 2 * width * layer.ffn.up.out_features
        return total


class MergingLayer(nn.Module):
    """Self-attention, a merge of tokens whose keys resemble each other, feed-forward; post-LN, as in BERT."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.attention = KeyedAttention(config.width, config.heads, config.dropout)
        self.residual = ResidualNorm(config.width, TOP_EPS, config.dropout)
        self.ffn = FeedForward(config.width, config.ffn_width, TOP_EPS, config.dropout)

    def forward(
        self, tokens: Tensor, sizes: Tensor | None, num_merges: int, protect_first: bool
    ) -> tuple[Tensor, Tensor | None, MergePlan | None]:
        """[B, T, D], fp32 [B, T] (None: plain means) -> both with ``num_merges`` fewer tokens, and the plan."""
        update, key = self.attention(tokens, sizes)
        tokens = self.residual(update, tokens)
        plan = bipartite_plan(key, num_merges, protect_first)
        if sizes is None:
            tokens = merge_mean(tokens, plan)
        else:
            tokens, sizes = merge_weighted(tokens, sizes, plan)
        return self.ffn(tokens), sizes, plan


class KeyedAttention(nn.Module):
    """Self-attention of all tokens of an image that also tells their keys, by which tokens are compared."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
        """[B, T, D] -> [B, T, D], and keys [B, T, D/H], the mean over heads.

        ``sizes`` fp32 [B, T]: a token that stands for n is attended to as n equal ones (their logarithms are added to
        the scores; Bolya et al. 2023, "Token Merging", section 3).
        """
        query, key, value = split_heads(self.qkv(tokens), self.num_heads, 3)
        bias = None if sizes is None else sizes.log()[:, None, None].to(query.dtype)
        rate = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=rate)
        return self.out(merge_heads(mixed)), key.mean(1)
