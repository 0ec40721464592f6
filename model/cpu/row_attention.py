"""Attention of packed text on a CPU, row by row, without padding, with dropout of the attention weights.

PyTorch has no fused attention with dropout for CPUs. What it runs instead works on padded grids and copies queries,
keys and values several times; here the products read them where they are, and padding is neither computed nor drawn.

Legend (suffixes of names): S packed queries, K packed keys, D width, H heads, C channels of a head (D / H), q and k
queries and keys of one block, W weights of all blocks and heads (the sum of H * q * k), flat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from model.cpu.dropout import dropout_factors

MERGED_FOR_NOTHING = 700  # weights of one head that cost as much as the dozen small operations of another block


class Block(NamedTuple):
    """Neighbouring queries that attend to one range of keys."""

    queries: slice
    keys: slice
    bias_qk: Tensor | None  # fp32, added to the scores: 0, or the lowest number where a query may not look
    sees_nothing_q1: Tensor | None  # bool, which queries have no key to look at; None if all have one


class Blocks:
    """The blocks of a batch, in the order of the queries.

    Short rows whose keys stand side by side share a block, masked from each other, where that costs less than a block
    more.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        keys: Sequence[tuple[int, int]],
        num_keys: int,
        visible: Callable[[slice, slice], Tensor],
    ) -> None:
        """
        Args:
            lengths: packed queries of each row.
            keys: range of packed keys that each row attends to.
            num_keys: K.
            visible: for a range of queries and one of keys, bool [q, k], whether a query may attend to a key.
        """
        self.blocks = [_block(queries, keys, visible) for queries, keys in _merged(lengths, keys)]
        self.shapes = [(_length(block.queries), _length(block.keys)) for block in self.blocks]
        self.num_weights = sum(q * k for q, k in self.shapes)
        starts, stops = ([getattr(block.keys, end) for block in self.blocks] for end in ("start", "stop"))
        self.each_key_once = [*starts, num_keys] == [0, *stops]  # the gradients of keys are then written, not added

    def weights(self, flat_W: Tensor, num_heads: int) -> list[Tensor]:
        """Weights of all blocks -> those of each block [H, q, k]."""
        parts = flat_W.split([num_heads * q * k for q, k in self.shapes])
        return [part.view(num_heads, q, k) for part, (q, k) in zip(parts, self.shapes, strict=True)]

    def queries(self, by_head_HSC: Tensor) -> Sequence[Tensor]:
        """The queries of each block [H, q, C]."""
        return by_head_HSC.split([q for q, _ in self.shapes], 1)

    def keys(self, by_head_HKC: Tensor) -> Sequence[Tensor]:
        """The keys of each block [H, k, C]."""
        if self.each_key_once:
            return by_head_HKC.split([k for _, k in self.shapes], 1)
        return [by_head_HKC[:, block.keys] for block in self.blocks]


def text_blocks(
    query_cells: tuple[Tensor, Tensor], key_cells: tuple[Tensor, Tensor], mask: Tensor, num_captions: int
) -> Blocks:
    """Text attends to text of its row; ``mask`` bool [R, T, U], cells are row and position in the grid, int64 [S]."""
    (query_row, query_position), (key_row, key_position) = query_cells, key_cells
    lengths, key_lengths = (_per_caption(row, num_captions) for row in (query_row, key_row))

    def visible(query: slice, key: slice) -> Tensor:
        row_q1, row_1k = query_row[query, None], key_row[None, key]
        return (row_q1 == row_1k) & mask[row_q1, query_position[query, None], key_position[None, key]]

    ends = list(accumulate(key_lengths))
    ranges = [(end - length, end) for end, length in zip(ends, key_lengths, strict=True)]
    return Blocks(lengths, ranges, len(key_row), visible)


def image_blocks(query_row: Tensor, image_of_row: Tensor, num_images: int, num_tokens: int) -> Blocks:
    """Text, in rows ``query_row`` int64 [S] of the grid, attends to all tokens of its row's image (int64 [R])."""
    image_S = image_of_row[query_row]

    def visible(query: slice, key: slice) -> Tensor:
        return image_S[query, None] == torch.arange(key.start, key.stop)[None] // num_tokens

    ranges = [(image * num_tokens, (image + 1) * num_tokens) for image in image_of_row.tolist()]
    return Blocks(_per_caption(query_row, len(ranges)), ranges, num_images * num_tokens, visible)


def _per_caption(row: Tensor, num_captions: int) -> list[int]:
    """How many states, in the rows ``row`` int64 [S] of the grid, each caption has."""
    return torch.bincount(row % num_captions, minlength=num_captions).tolist()


class RowAttention:
    """An ``Attention`` of :mod:`model.attention` that computes the blocks one after another."""

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks

    def __call__(self, query: Tensor, key_value: Tensor | None, num_heads: int, rate: float) -> Tensor:
        """query [S, D], key_value [K, 2D] -> [S, D]; or query [S, 3D] with its own keys and values beside it."""
        return _AttendRows.apply(query, key_value, self.blocks, num_heads, rate)


class _AttendRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, packed: Tensor, key_value: Tensor | None, blocks: Blocks, num_heads: int, rate: float) -> Tensor:
        query_HSC, key_HKC, value_HKC = _by_head(packed, key_value, num_heads)
        softmax_W = packed.new_empty(num_heads * blocks.num_weights)
        parts = blocks.weights(softmax_W, num_heads), blocks.queries(query_HSC), blocks.keys(key_HKC)
        for block, scores_Hqk, query_HqC, key_HkC in zip(blocks.blocks, *parts, strict=True):
            scale = query_HSC.shape[2] ** -0.5
            torch.baddbmm(scores_Hqk, query_HqC, key_HkC.mT, beta=0, alpha=scale, out=scores_Hqk)
            if block.bias_qk is not None:
                scores_Hqk.add_(block.bias_qk)
            torch.softmax(scores_Hqk, -1, out=scores_Hqk)
            if block.sees_nothing_q1 is not None:
                scores_Hqk.masked_fill_(block.sees_nothing_q1, 0)
        factors_W = dropout_factors(softmax_W.shape, rate, softmax_W.dtype)
        mixed_SHC = packed.new_empty(packed.shape[0], num_heads, query_HSC.shape[2])
        dropped_W = softmax_W * factors_W
        parts = blocks.queries(mixed_SHC.transpose(0, 1)), blocks.weights(dropped_W, num_heads), blocks.keys(value_HKC)
        for mixed_HqC, dropped_Hqk, value_HkC in zip(*parts, strict=True):
            mixed_HqC.copy_(torch.bmm(dropped_Hqk, value_HkC))
        ctx.save_for_backward(packed, key_value, softmax_W, factors_W, dropped_W)
        ctx.blocks, ctx.num_heads = blocks, num_heads
        return mixed_SHC.flatten(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_SD: Tensor):
        packed, key_value, softmax_W, factors_W, dropped_W = ctx.saved_tensors
        blocks, num_heads = ctx.blocks, ctx.num_heads
        new, write = (torch.empty_like, Tensor.copy_) if blocks.each_key_once else (torch.zeros_like, Tensor.add_)
        packed_grad, key_value_grad = new(packed), None if key_value is None else new(key_value)
        query_HSC, key_HKC, value_HKC = _by_head(packed, key_value, num_heads)
        query_grad_HSC, key_grad_HKC, value_grad_HKC = _by_head(packed_grad, key_value_grad, num_heads)
        scale = query_HSC.shape[2] ** -0.5

        # through the values: gradients of the values and of the dropped weights, then of the softmax
        weights_grad_W = torch.empty_like(softmax_W)
        weights_grads = blocks.weights(weights_grad_W, num_heads)
        grads = blocks.queries(grad_SD.unflatten(1, (num_heads, -1)).transpose(0, 1))
        parts = blocks.weights(dropped_W, num_heads), blocks.keys(value_HKC), blocks.keys(value_grad_HKC)
        for grad_HqC, weights_grad_Hqk, dropped_Hqk, value_HkC, value_grad_HkC in zip(
            grads, weights_grads, *parts, strict=True
        ):
            torch.baddbmm(weights_grad_Hqk, grad_HqC, value_HkC.mT, beta=0, alpha=scale, out=weights_grad_Hqk)
            write(value_grad_HkC, torch.bmm(dropped_Hqk.mT, grad_HqC))
        weights_grad_W.mul_(factors_W)

        # through the scores: gradients of queries and keys
        parts = blocks.queries(query_HSC), blocks.keys(key_HKC), blocks.queries(query_grad_HSC)
        softmaxes = blocks.weights(softmax_W, num_heads)
        for weights_grad_Hqk, softmax_Hqk, query_HqC, key_HkC, query_grad_HqC, key_grad_HkC in zip(
            weights_grads, softmaxes, *parts, blocks.keys(key_grad_HKC), strict=True
        ):
            scores_grad_Hqk = torch.ops.aten._softmax_backward_data(
                weights_grad_Hqk, softmax_Hqk, -1, softmax_Hqk.dtype
            )
            query_grad_HqC.copy_(torch.bmm(scores_grad_Hqk, key_HkC))
            write(key_grad_HkC, torch.bmm(scores_grad_Hqk.mT, query_HqC))
        return packed_grad, key_value_grad, None, None, None


def _by_head(packed: Tensor, key_value: Tensor | None, num_heads: int) -> tuple[Tensor, ...]:
    """Query [H, S, C], key and value [H, K, C], all views; ``packed`` is [S, D], or [S, 3D] without ``key_value``."""
    if key_value is None:
        return packed.unflatten(1, (3 * num_heads, -1)).transpose(0, 1).split(num_heads)
    both = key_value.unflatten(1, (2 * num_heads, -1)).transpose(0, 1)
    return packed.unflatten(1, (num_heads, -1)).transpose(0, 1), *both.split(num_heads)


def _merged(lengths: Sequence[int], keys: Sequence[tuple[int, int]]) -> list[tuple[slice, slice]]:
    """Queries and keys of each block; rows without queries are in none."""
    merged: list[tuple[slice, slice]] = []
    end = 0
    for length, (first, last) in zip(lengths, keys, strict=True):
        if length == 0:
            continue
        start, end = end, end + length
        if merged:
            queries, range_ = merged[-1]
            wasted = _length(queries) * (last - first) + length * _length(range_)
            if (first, last) == (range_.start, range_.stop):
                merged[-1] = slice(queries.start, end), range_
                continue
            if first == range_.stop and wasted <= MERGED_FOR_NOTHING:
                merged[-1] = slice(queries.start, end), slice(range_.start, last)
                continue
        merged.append((slice(start, end), slice(first, last)))
    return merged


def _block(queries: slice, keys: slice, visible: Callable[[slice, slice], Tensor]) -> Block:
    visible_qk = visible(queries, keys)
    if visible_qk.all():
        return Block(queries, keys, None, None)
    bias_qk = torch.zeros(visible_qk.shape).masked_fill_(~visible_qk, torch.finfo(torch.float32).min)
    sees_nothing_q1 = ~visible_qk.any(-1, keepdim=True)
    return Block(queries, keys, bias_qk, sees_nothing_q1 if sees_nothing_q1.any() else None)


def _length(part: slice) -> int:
    return part.stop - part.start
