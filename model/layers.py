"""Attention and feed-forward blocks on packed text, written for post-LN BERT layers.

Legend: S packed states, D width, H heads, T padded length, G rows of a padded grid, P image tokens.
Text is packed: states of all rows stand one after another without padding in ``[S, D]``; only inside attention are
they spread over a padded grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def dropout(states: Tensor, rate: float) -> Tensor:
    """Dropout for training; on a CPU by ``_factors_on_cpu``."""
    if rate == 0 or states.device.type != "cpu":
        return F.dropout(states, rate)
    return states * _factors_on_cpu(states.shape, rate, states.dtype)


def dropout_add(update: Tensor, states: Tensor, rate: float) -> Tensor:
    """dropout(update) + states, in one operation on a CPU."""
    if rate == 0 or states.device.type != "cpu":
        return F.dropout(update, rate) + states
    return torch.addcmul(states, update, _factors_on_cpu(update.shape, rate, update.dtype))


def _factors_on_cpu(shape: torch.Size, rate: float, dtype: torch.dtype) -> Tensor:
    """What dropout multiplies by: 0 with probability ``rate``, else 1 / (1 - ``rate``).

    Drawing the numbers is what costs on a CPU, so four elements share a 64-bit draw; the rate is then met to the next
    1/65536. The comparison writes numbers at once: as booleans they would have to be converted, which takes longer.
    """
    num_elements = shape.numel()
    draws = torch.empty(-(-num_elements // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    draws = draws[:num_elements].view(shape)
    kept = torch.ge(draws, round(rate * 2**16) - 2**15, out=torch.empty(shape, dtype=dtype))
    return kept.mul_(1 / (1 - rate))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rate: float) -> Tensor:
    """Attention with dropout of the weights: [G, H, T, D/H], bool mask (True = may attend) or None -> [G, H, T, D/H].

    On a CPU, where SDPA has no fused kernel with dropout, the weights are dropped by ``_factors_on_cpu``; a query that
    sees nothing gives 0 in both.
    """
    if rate == 0 or query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=rate)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    factors = _factors_on_cpu(scores.shape, rate, scores.dtype)
    if mask is not None:
        hidden = torch.zeros(mask.shape, dtype=scores.dtype).masked_fill_(~mask, torch.finfo(scores.dtype).min)
        scores = scores.add_(hidden)
        factors = factors.masked_fill_(~mask.any(-1, keepdim=True), 0)
    return (scores.softmax(-1) * factors) @ value


class Packing:
    """The map between packed states [S, ...] and a padded grid [rows, positions, ...]."""

    def __init__(self, index: Tensor, num_rows: int, num_positions: int) -> None:
        """``index`` int64 [S]: flat grid position row*positions+position of each packed state, without repeats."""
        self.index, self.num_rows, self.num_positions = index, num_rows, num_positions

    def spread(self, packed: Tensor) -> Tensor:
        """[S, ...] -> [rows, positions, ...]; positions nobody holds are zero."""
        grid = packed.new_zeros(self.num_rows * self.num_positions, *packed.shape[1:])
        return grid.index_copy_(0, self.index, packed).unflatten(0, (self.num_rows, self.num_positions))

    def gather(self, grid: Tensor) -> Tensor:
        """[rows, positions, ...] -> [S, ...]."""
        return grid.flatten(0, 1).index_select(0, self.index)


def split_heads(states: Tensor, num_heads: int, parts: int = 1) -> tuple[Tensor, ...]:
    """[G, T, parts*D] -> ``parts`` tensors [G, H, T, D/H]."""
    heads = states.unflatten(-1, (parts, num_heads, -1))
    return tuple(part.transpose(1, 2) for part in heads.unbind(2))


def merge_heads(heads: Tensor) -> Tensor:
    """[G, H, T, D/H] -> [G, T, D]."""
    return heads.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Masked self-attention over text; returns the output projection, without residual."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, states: Tensor, packing: Packing, mask: Tensor) -> Tensor:
        """states [S, D], mask bool [rows, 1, T, T] -> [S, D]."""
        query, key, value = split_heads(packing.spread(self.qkv(states)), self.num_heads, 3)
        mixed = attend(query, key, value, mask, self.dropout if self.training else 0.0)
        return self.out(packing.gather(merge_heads(mixed)))


class CrossAttention(nn.Module):
    """Attention from packed queries to a context whose keys and values are computed once."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def to_images(
        self, states: Tensor, side_by_side: Packing, context: Tensor, image_of_row: Tensor, num_paired: int
    ) -> Tensor:
        """Text of every stream reads image tokens; the keys and values of an image serve every row that reads it.

        Args:
            states: [S, D], all streams.
            side_by_side: of the states, all streams of a row in one row of the grid.
            context: image tokens [B, P, D].
            image_of_row: int64 [R].
            num_paired: B if rows 0..B-1 read images 0..B-1, whose keys and values are then not copied; else 0.
        """
        keys_values = self.key_value(context)
        (query,) = split_heads(side_by_side.spread(self.query(states)), self.num_heads)  # [R, H, streams*T, D/H]
        read = [keys_values] if num_paired else []
        if query.shape[0] > num_paired:
            read.append(keys_values.index_select(0, image_of_row[num_paired:]))
        rows = query.split([len(part) for part in read])
        parts = [
            self._attend(part, *split_heads(images, self.num_heads, 2), None)
            for part, images in zip(rows, read, strict=True)
        ]
        mixed = torch.cat(parts) if len(parts) > 1 else parts[0]
        return self.out(side_by_side.gather(merge_heads(mixed)))

    def to_streams(
        self, queries: Tensor, query_packing: Packing, streams: Tensor, side_by_side: Packing, mask: Tensor
    ) -> Tensor:
        """Reconstruction queries read the states of both streams.

        Args:
            queries: [Q, D].
            query_packing: of the queries, over R rows.
            streams: [S, D], both streams.
            side_by_side: of the streams, both of a row in one row of the grid.
            mask: bool [R, 1, T, 2T].
        """
        key, value = split_heads(side_by_side.spread(self.key_value(streams)), self.num_heads, 2)
        (query,) = split_heads(query_packing.spread(self.query(queries)), self.num_heads)
        return self.out(query_packing.gather(merge_heads(self._attend(query, key, value, mask))))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return attend(query, key, value, mask, self.dropout if self.training else 0.0)


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
