"""Attention of packed text on a CPU, row by row, without padding, with dropout of the attention weights.

PyTorch has no fused attention with dropout for CPUs. What it runs instead works on padded grids and copies queries,
keys and values several times; here the products read them where they are, and padding is neither computed nor drawn.

Legend: S packed queries, K packed keys, D width, H heads, E weights of one head (the sum over blocks of q * k).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.cpu.dropout import factors_on_cpu

MERGED_FOR_NOTHING = 700  # weights of one head that cost as much as the dozen small operations of another block


class Block(NamedTuple):
    """Neighbouring queries that read from one range of keys."""

    queries: slice
    keys: slice
    hidden: Tensor | None  # fp32 [q, k], added to the scores: 0, or the lowest number where a query may not look
    blind: Tensor | None  # bool [q, 1], which queries see nothing, if any does


class Rows:
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
            keys: range of packed keys that each row reads.
            num_keys: K.
            visible: for a range of queries and one of keys, bool [q, k], whether a query may read a key.
        """
        self.blocks = [_block(queries, keys, visible) for queries, keys in _merged(lengths, keys)]
        self.shapes = [(_length(block.queries), _length(block.keys)) for block in self.blocks]
        self.num_weights = sum(q * k for q, k in self.shapes)
        starts, stops = ([getattr(block.keys, end) for block in self.blocks] for end in ("start", "stop"))
        self.each_key_once = [*starts, num_keys] == [0, *stops]  # the gradients of keys are then written, not added

    def weights(self, flat: Tensor, num_heads: int) -> list[Tensor]:
        """Weights of all blocks [H * E] -> those of each block [H, q, k]."""
        parts = flat.split([num_heads * q * k for q, k in self.shapes])
        return [part.view(num_heads, q, k) for part, (q, k) in zip(parts, self.shapes, strict=True)]

    def queries(self, by_head: Tensor) -> Sequence[Tensor]:
        """[H, S, D/H] -> the queries of each block [H, q, D/H]."""
        return by_head.split([q for q, _ in self.shapes], 1)

    def keys(self, by_head: Tensor) -> Sequence[Tensor]:
        """[H, K, D/H] -> the keys of each block [H, k, D/H]."""
        if self.each_key_once:
            return by_head.split([k for _, k in self.shapes], 1)
        return [by_head[:, block.keys] for block in self.blocks]


def attend_rows(query: Tensor, key_value: Tensor | None, rows: Rows, num_heads: int, rate: float) -> Tensor:
    """Softmax attention with dropout of the weights; a query that sees nothing gives 0.

    Args:
        query: [S, D], or [S, 3D] with keys and values beside it where ``key_value`` is None.
        key_value: [K, 2D].
        rows: who reads what.
        num_heads: H.
        rate: dropout probability of the weights.

    Returns:
        [S, D].
    """
    return _AttendRows.apply(query, key_value, rows, num_heads, rate)


class _AttendRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, packed: Tensor, key_value: Tensor | None, rows: Rows, num_heads: int, rate: float) -> Tensor:
        query, key, value = _by_head(packed, key_value, num_heads)
        weights = packed.new_empty(num_heads * rows.num_weights)
        parts = rows.weights(weights, num_heads), rows.queries(query), rows.keys(key)
        for block, scores, own, keys in zip(rows.blocks, *parts, strict=True):
            torch.baddbmm(scores, own, keys.mT, beta=0, alpha=query.shape[2] ** -0.5, out=scores)
            if block.hidden is not None:
                scores.add_(block.hidden)
            torch.softmax(scores, -1, out=scores)
            if block.blind is not None:
                scores.masked_fill_(block.blind, 0)
        factors = factors_on_cpu(weights.shape, rate, weights.dtype)
        mixed = packed.new_empty(packed.shape[0], num_heads, query.shape[2])
        left = weights * factors
        parts = rows.queries(mixed.transpose(0, 1)), rows.weights(left, num_heads), rows.keys(value)
        for place, dropped, values in zip(*parts, strict=True):
            place.copy_(torch.bmm(dropped, values))
        ctx.save_for_backward(packed, key_value, weights, factors, left)
        ctx.rows, ctx.num_heads = rows, num_heads
        return mixed.flatten(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        packed, key_value, weights, factors, left = ctx.saved_tensors
        rows, num_heads = ctx.rows, ctx.num_heads
        new, put = (torch.empty_like, Tensor.copy_) if rows.each_key_once else (torch.zeros_like, Tensor.add_)
        packed_grad, key_value_grad = new(packed), None if key_value is None else new(key_value)
        query, key, value = _by_head(packed, key_value, num_heads)
        query_grad, key_grad, value_grad = _by_head(packed_grad, key_value_grad, num_heads)
        grads = rows.queries(grad.unflatten(1, (num_heads, -1)).transpose(0, 1))
        weights_grad = torch.empty_like(weights)
        weights_grads = rows.weights(weights_grad, num_heads)
        parts = rows.weights(left, num_heads), rows.keys(value), rows.keys(value_grad)
        for own, part, dropped, values, place in zip(grads, weights_grads, *parts, strict=True):
            torch.baddbmm(part, own, values.mT, beta=0, alpha=query.shape[2] ** -0.5, out=part)
            put(place, torch.bmm(dropped.mT, own))
        weights_grad.mul_(factors)
        parts = rows.queries(query), rows.keys(key), rows.queries(query_grad), rows.keys(key_grad)
        softmaxes = rows.weights(weights, num_heads)
        for part, softmax, own, keys, place, key_place in zip(weights_grads, softmaxes, *parts, strict=True):
            scores_grad = torch.ops.aten._softmax_backward_data(part, softmax, -1, softmax.dtype)
            place.copy_(torch.bmm(scores_grad, keys))
            put(key_place, torch.bmm(scores_grad.mT, own))
        return packed_grad, key_value_grad, None, None, None


def _by_head(packed: Tensor, key_value: Tensor | None, num_heads: int) -> tuple[Tensor, ...]:
    """Query [H, S, D/H], key and value [H, K, D/H], all views."""
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
    may_look = visible(queries, keys)
    if may_look.all():
        return Block(queries, keys, None, None)
    hidden = torch.zeros(may_look.shape).masked_fill_(~may_look, torch.finfo(torch.float32).min)
    blind = ~may_look.any(-1, keepdim=True)
    return Block(queries, keys, hidden, blind if blind.any() else None)


def _length(part: slice) -> int:
    return part.stop - part.start
