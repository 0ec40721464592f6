"""RoBERTa-style text tower on packed tokens: embeddings, uni-modal bottom layers, cross-modal top layers.

Specification sections 2.2 and 2.3. Legend: S packed states, D width, B images, P image tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Reading
from model.config import TextConfig
from model.cpu.kept_memory import KeptMemory
from model.layers import CrossAttention, FeedForward, ResidualNorm, SelfAttention

BOTTOM_EPS = 1e-5  # RoBERTa's LayerNorm
TOP_EPS = 1e-12  # BERT's, used by all layers that FLM adds
PAD_POSITION = 1  # row of the position table for padding; the first token stands at row 2
BERT_STD, BERT_WIDTH = 0.02, 768


def initial_std(width: int) -> float:
    """Standard deviation of random weights: BERT's 0.02 at its width of 768, elsewhere in proportion to 1/sqrt(width).

    A layer's output has the same variance at every width then, and narrow networks learn much faster (docs/log.md).
    """
    return BERT_STD * (BERT_WIDTH / width) ** 0.5


class WordEmbedding(nn.Embedding):
    """``nn.Embedding`` with ``padding_idx`` whose gradient, on a CPU, is written to the same memory in every step."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._memory = KeptMemory()

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [S] -> [S, D]."""
        if ids.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(ids)
        return _LookUp.apply(self.weight, ids, self.padding_idx, self._memory)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, ids: Tensor, padding_idx: int, memory: KeptMemory) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.padding_idx, ctx.memory = weight.shape, padding_idx, memory
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (ids,) = ctx.saved_tensors
        weight_grad = ctx.memory.empty(ctx.shape, grad.dtype, grad.device).zero_().index_add_(0, ids, grad)
        weight_grad[ctx.padding_idx] = 0
        return weight_grad, None, None, None


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


class BottomLayer(nn.Module):
    """Post-LN BERT layer: masked self-attention, feed-forward."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config.width, config.heads, config.dropout)
        self.residual = ResidualNorm(config.width, BOTTOM_EPS, config.dropout)
        self.ffn = FeedForward(config.width, config.ffn_width, BOTTOM_EPS, config.dropout)

    def forward(self, states: Tensor, text: Reading) -> Tensor:
        """states [S, D] -> [S, D]."""
        return self.ffn(self.residual(self.attention(states, text), states))


class TopLayer(nn.Module):
    """Post-LN layer: masked self-attention, cross-attention to all image tokens, feed-forward."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config.width, config.heads, config.dropout)
        self.residual = ResidualNorm(config.width, TOP_EPS, config.dropout)
        self.cross_attention = CrossAttention(config.width, config.heads, config.dropout)
        self.cross_residual = ResidualNorm(config.width, TOP_EPS, config.dropout)
        self.ffn = FeedForward(config.width, config.ffn_width, TOP_EPS, config.dropout)

    def forward(self, states: Tensor, text: Reading, images: Tensor, image: Reading) -> Tensor:
        """states [S, D], which read each other by ``text``, and images [B * P, D] by ``image`` -> [S, D]."""
        states = self.residual(self.attention(states, text), states)
        return self.ffn(self.cross_residual(self.cross_attention(states, images, image), states))
