"""Which packed states read which in attention, worked out once a batch and used by every layer.

Text is packed: states of all rows stand one after another without padding in ``[S, D]``. A reading mixes the values
that packed queries read. On an accelerator, and wherever nothing is dropped out, it goes through a padded grid to
PyTorch's fused attention; on a CPU, where no fused kernel drops weights, row by row (:mod:`model.cpu.row_attention`).

Legend: S packed queries, K packed keys, D width, H heads, R rows of a padded grid, T and U its positions (of queries
and of keys), P image tokens, B images.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.cpu.row_attention import Rows, attend_rows


class Reading(Protocol):
    """Attention from packed queries to the keys they may see."""

    def __call__(self, query: Tensor, key_value: Tensor | None, num_heads: int, rate: float) -> Tensor:
        """query [S, D], key_value [K, 2D] -> [S, D]; or query [S, 3D] with its own keys and values beside it.

        ``rate``: dropout probability of the attention weights.
        """


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

    def cells(self) -> tuple[Tensor, Tensor]:
        """Row and position of each packed state, int64 [S] both."""
        return self.index // self.num_positions, self.index % self.num_positions

    def per_caption(self, num_captions: int) -> list[int]:
        """How many of the states belong to each caption, row r to caption r % ``num_captions``; waits for a device."""
        return torch.bincount(self.cells()[0] % num_captions, minlength=num_captions).tolist()


def reads_by_rows(device: torch.device, rate: float) -> bool:
    """Whether to read row by row rather than through the grid; ``rate`` is the dropout probability."""
    return device.type == "cpu" and rate > 0 and not torch.compiler.is_compiling()


def text_reading(queries: Packing, keys: Packing, mask: Tensor, num_captions: int, by_rows: bool) -> Reading:
    """States, or queries, of a caption read states of the same row of the grid.

    Args:
        queries: over R rows; row r belongs to caption r % ``num_captions``, and a caption's queries stand together, in
            the order of the captions.
        keys: over R rows likewise.
        mask: bool [R, T, U], True = may attend; False where no key is held.
        num_captions: rows per stream.
        by_rows: read row by row instead of through the grid.
    """
    if not by_rows:
        return _GridReading(queries, keys, mask[:, None])
    lengths, key_lengths = queries.per_caption(num_captions), keys.per_caption(num_captions)
    query_row, query_place = queries.cells()
    key_row, key_place = keys.cells()

    def visible(query: slice, key: slice) -> Tensor:
        row, other = query_row[query, None], key_row[None, key]
        return (row == other) & mask[row, query_place[query, None], key_place[None, key]]

    ends = list(accumulate(key_lengths))
    ranges = [(end - length, end) for end, length in zip(ends, key_lengths, strict=True)]
    return _RowReading(Rows(lengths, ranges, len(keys.index), visible))


def image_reading(
    queries: Packing, image_of_row: Tensor, num_paired: int, num_images: int, num_tokens: int, by_rows: bool
) -> Reading:
    """Text reads all tokens of its row's image; the keys are those of all images, [B * P, 2D].

    Args:
        queries: of the text, over R rows, in ascending order.
        image_of_row: int64 [R].
        num_paired: B if rows 0..B-1 read images 0..B-1, whose keys and values are then not copied; else 0.
        num_images: B.
        num_tokens: P.
        by_rows: read row by row instead of through the grid.
    """
    if not by_rows:
        return _ImageGridReading(queries, image_of_row, num_paired, num_images)
    own_image = image_of_row[queries.cells()[0]]

    def visible(query: slice, key: slice) -> Tensor:
        return own_image[query, None] == torch.arange(key.start, key.stop)[None] // num_tokens

    ranges = [(image * num_tokens, (image + 1) * num_tokens) for image in image_of_row.tolist()]
    return _RowReading(Rows(queries.per_caption(len(ranges)), ranges, num_images * num_tokens, visible))


class _GridReading:
    def __init__(self, queries: Packing, keys: Packing, mask: Tensor) -> None:
        self.queries, self.keys, self.mask = queries, keys, mask

    def __call__(self, query: Tensor, key_value: Tensor | None, num_heads: int, rate: float) -> Tensor:
        if key_value is None:
            query, key, value = split_heads(self.queries.spread(query), num_heads, 3)
        else:
            (query,) = split_heads(self.queries.spread(query), num_heads)
            key, value = split_heads(self.keys.spread(key_value), num_heads, 2)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask, dropout_p=rate)
        return self.queries.gather(merge_heads(mixed))


class _ImageGridReading:
    def __init__(self, queries: Packing, image_of_row: Tensor, num_paired: int, num_images: int) -> None:
        self.queries, self.image_of_row = queries, image_of_row
        self.num_paired, self.num_images = num_paired, num_images

    def __call__(self, query: Tensor, key_value: Tensor, num_heads: int, rate: float) -> Tensor:
        (query,) = split_heads(self.queries.spread(query), num_heads)  # [R, H, T, D/H]
        images = key_value.unflatten(0, (self.num_images, -1))
        read = [images] if self.num_paired else []
        if query.shape[0] > self.num_paired:
            read.append(images.index_select(0, self.image_of_row[self.num_paired :]))
        parts = [
            F.scaled_dot_product_attention(part, *split_heads(tokens, num_heads, 2), dropout_p=rate)
            for part, tokens in zip(query.split([len(tokens) for tokens in read]), read, strict=True)
        ]
        mixed = torch.cat(parts) if len(parts) > 1 else parts[0]
        return self.queries.gather(merge_heads(mixed))


class _RowReading:
    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __call__(self, query: Tensor, key_value: Tensor | None, num_heads: int, rate: float) -> Tensor:
        return attend_rows(query, key_value, self.rows, num_heads, rate)


def split_heads(states: Tensor, num_heads: int, parts: int = 1) -> tuple[Tensor, ...]:
    """[R, T, parts*D] -> ``parts`` tensors [R, H, T, D/H]."""
    heads = states.unflatten(-1, (parts, num_heads, -1))
    return tuple(part.transpose(1, 2) for part in heads.unbind(2))


def merge_heads(heads: Tensor) -> Tensor:
    """[R, H, T, D/H] -> [R, T, D]."""
    return heads.transpose(1, 2).flatten(2)
