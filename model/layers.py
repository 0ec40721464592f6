"""All layers of the text towers and the reconstructor, on packed text (specification sections 2.2, 2.3 and 2.5).

Layers are post-LN, as in BERT: LayerNorm(dropout(sublayer(x)) + x). Which state sees which is worked out once a batch
and given to every layer as an ``Attention`` (:mod:`model.attention`).

Legend: S packed states, Q packed queries, K packed keys, D width, B images, P image tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Attention
from model.config import TextConfig
from model.cpu import door
from model.dropout import dropout_add

BOTTOM_EPS = 1e-5  # RoBERTa's LayerNorm
TOP_EPS = 1e-12  # BERT's, used by all layers that FLM adds
PAD_POSITION = 1  # row of the position table for padding; the first token stands at row 2
BERT_STD, BERT_WIDTH = 0.02, 768


def initial_std(width: int) -> float:
    """Standard deviation of random weights: BERT's 0.02 at its width of 768, elsewhere in proportion to 1/sqrt(width).

    A layer's output has the same variance at every width then, and narrow networks learn much faster (docs/log.md).
    """
    return BERT_STD * (BERT_WIDTH / width) ** 0.5


class TextEmbedding(nn.Module):
    """Word + position + token-type embedding and LayerNorm; dropout is left to the caller, one draw per stream."""

    def __init__(self, config: TextConfig, vocabulary_size: int, pad_id: int) -> None:
        super().__init__()
        self.word = WordEmbedding(vocabulary_size, config.width, padding_idx=pad_id)
        self.position = nn.Embedding(config.max_positions, config.width, padding_idx=PAD_POSITION)
        self.token_type = nn.Parameter(torch.empty(config.width))
        self.norm = nn.LayerNorm(config.width, eps=BOTTOM_EPS)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """ids and positions int64 [S] (0 for `<s>`, -1 for padding) -> [S, D]."""
        return self.norm(self.word(ids) + self.position(positions + PAD_POSITION + 1) + self.token_type)


class WordEmbedding(nn.Embedding):
    """``nn.Embedding`` with ``padding_idx``; on a CPU its gradient is written to the same memory in every step."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._memory = door.KeptMemory()

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [S] -> [S, D]."""
        if not door.is_open(ids.device):
            return super().forward(ids)
        return door.look_up(self.weight, ids, self.padding_idx, self._memory)


class BottomLayer(nn.Module):
    """Masked self-attention, feed-forward."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config.width, config.heads, config.dropout)
        self.residual = ResidualNorm(config.width, BOTTOM_EPS, config.dropout)
        self.ffn = FeedForward(config.width, config.ffn_width, BOTTOM_EPS, config.dropout)

    def forward(self, states: Tensor, attend_text: Attention) -> Tensor:
        """states [S, D] -> [S, D]."""
        return self.ffn(self.residual(self.attention(states, attend_text), states))


class TopLayer(nn.Module):
    """Masked self-attention, cross-attention to all image tokens, feed-forward."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config.width, config.heads, config.dropout)
        self.residual = ResidualNorm(config.width, TOP_EPS, config.dropout)
        self.cross_attention = CrossAttention(config.width, config.heads, config.dropout)
        self.cross_residual = ResidualNorm(config.width, TOP_EPS, config.dropout)
        self.ffn = FeedForward(config.width, config.ffn_width, TOP_EPS, config.dropout)

    def forward(self, states: Tensor, attend_text: Attention, images: Tensor, attend_images: Attention) -> Tensor:
        """states [S, D], images [B * P, D] -> [S, D]."""
        states = self.residual(self.attention(states, attend_text), states)
        return self.ffn(self.cross_residual(self.cross_attention(states, images, attend_images), states))


class ReconstructorLayer(nn.Module):
    """Cross-attention from the queries to the states of both streams, then feed-forward; queries never see queries."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.cross_attention = CrossAttention(config.width, config.heads, config.dropout)
        self.cross_residual = ResidualNorm(config.width, TOP_EPS, config.dropout)
        self.ffn = FeedForward(config.width, config.ffn_width, TOP_EPS, config.dropout)

    def forward(self, queries: Tensor, states: Tensor, attend_states: Attention) -> Tensor:
        """queries [Q, D], states [S, D] (outputs of its text layer) -> [Q, D]."""
        return self.ffn(self.cross_residual(self.cross_attention(queries, states, attend_states), queries))


class SelfAttention(nn.Module):
    """Attention among the states; returns the output projection, without residual."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, states: Tensor, attend: Attention) -> Tensor:
        """states [S, D] -> [S, D]."""
        return self.out(attend(self.qkv(states), None, self.num_heads, self.dropout if self.training else 0.0))


class CrossAttention(nn.Module):
    """Attention from packed queries to a context whose keys and values are computed once."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, queries: Tensor, context: Tensor, attend: Attention) -> Tensor:
        """queries [Q, D], context [K, D] (text states of all streams, or the tokens of all images) -> [Q, D]."""
        rate = self.dropout if self.training else 0.0
        return self.out(attend(self.query(queries), self.key_value(context), self.num_heads, rate))


class ResidualNorm(nn.Module):
    """LayerNorm(dropout(update) + states)."""

    def __init__(self, width: int, eps: float, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps)
        self.dropout = dropout

    def forward(self, update: Tensor, states: Tensor) -> Tensor:
        """[S, D], [S, D] -> [S, D]."""
        return self.norm(dropout_add(update, states, self.dropout if self.training else 0.0))


class FeedForward(nn.Module):
    """Linear, exact GELU, linear, then the residual."""

    def __init__(self, width: int, ffn_width: int, eps: float, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(width, ffn_width)
        self.down = nn.Linear(ffn_width, width)
        self.residual = ResidualNorm(width, eps, dropout)

    def forward(self, states: Tensor) -> Tensor:
        """[S, D] -> [S, D]."""
        return self.residual(self.down(F.gelu(self.up(states))), states)
