"""Attention on packed text: which states and queries may see which, worked out once a batch and given to every layer.

Packed states of all rows stand one after another without padding, [S, D]. For attention they are copied into a padded
grid, where PyTorch's fused kernels run; on a CPU that drops weights out, for which PyTorch has no such kernel,
row by row instead (:mod:`model.cpu.row_attention`). Tensors that leave a function are packed.

Legend (suffixes of names): S packed queries, K packed keys, D width, H heads, C channels of a head (D / H), R rows of a
grid, T and U its positions (of queries and of keys), P image tokens, B images, E keys beside values (2D).
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.cpu import door


class Attention(Protocol):
    """Softmax attention from packed queries to the keys that they may see; a query that sees none gives 0."""

    def __call__(self, query: Tensor, key_value: Tensor | None, num_heads: int, rate: float) -> Tensor:
        """query [S, D], key_value [K, 2D] -> [S, D]; or query [S, 3D] with its own keys and values beside it.

        ``rate``: dropout probability of the attention weights.
        """


class Packing:
    """The map between packed states [S, ...] and a padded grid [rows, positions, ...]."""

    def __init__(self, index: Tensor, num_rows: int, num_positions: int) -> None:
        """``index`` int64 [S]: flat grid position row*positions+position of each packed state, without repeats."""
        self.index, self.num_rows, self.num_positions = index, num_rows, num_positions

    def pad(self, packed: Tensor) -> Tensor:
        """[S, ...] -> [rows, positions, ...]; padding is zero."""
        grid = packed.new_zeros(self.num_rows * self.num_positions, *packed.shape[1:])
        return grid.index_copy_(0, self.index, packed).unflatten(0, (self.num_rows, self.num_positions))

    def pack(self, grid: Tensor) -> Tensor:
        """[rows, positions, ...] -> [S, ...]."""
        return grid.flatten(0, 1).index_select(0, self.index)

    def cells(self) -> tuple[Tensor, Tensor]:
        """Row and position of each packed state, int64 [S] both."""
        return self.index // self.num_positions, self.index % self.num_positions


def text_attention(queries: Packing, keys: Packing, mask: Tensor, num_captions: int, rate: float) -> Attention:
    """Text attends to text of the same row of the grid.

    A caption may have several rows: with N captions, those of caption c are the rows c, c + N, c + 2N and so on (FLM:
    its l2r row, its r2l row). Packed states, of queries and of keys, are ordered by caption.

    Args:
        queries: over R rows.
        keys: over R rows.
        mask: bool [R, T, U], True = may attend; False at padding of the keys.
        num_captions: N, a divisor of R.
        rate: the highest dropout probability of the attention weights that layers will ask for.
    """
    if rate > 0 and door.is_open(mask.device):
        return door.RowAttention(door.text_blocks(queries.cells(), keys.cells(), mask, num_captions))
    return _PaddedTextAttention(queries, keys, mask[:, None])


def image_attention(
    queries: Packing, image_of_row: Tensor, num_paired: int, num_images: int, num_tokens: int, rate: float
) -> Attention:
    """Text attends to all tokens of its row's image; keys and values are those of all images, [B * P, 2D].

    Args:
        queries: of the text, over R rows, in ascending order.
        image_of_row: int64 [R].
        num_paired: B if rows 0..B-1 read images 0..B-1, whose keys and values are then not copied; else 0.
        num_images: B.
        num_tokens: P.
        rate: as of :func:`text_attention`.
    """
    if rate > 0 and door.is_open(image_of_row.device):
        return door.RowAttention(door.image_blocks(queries.cells()[0], image_of_row, num_images, num_tokens))
    return _PaddedImageAttention(queries, image_of_row, num_paired, num_images)


class _PaddedTextAttention:
    def __init__(self, queries: Packing, keys: Packing, mask_R1TU: Tensor) -> None:
        self.queries, self.keys, self.mask_R1TU = queries, keys, mask_R1TU

    def __call__(self, query_SD: Tensor, key_value_KE: Tensor | None, num_heads: int, rate: float) -> Tensor:
        if key_value_KE is None:
            query_RHTC, key_RHUC, value_RHUC = split_heads(self.queries.pad(query_SD), num_heads, 3)
        else:
            (query_RHTC,) = split_heads(self.queries.pad(query_SD), num_heads)
            key_RHUC, value_RHUC = split_heads(self.keys.pad(key_value_KE), num_heads, 2)
        mixed_RHTC = F.scaled_dot_product_attention(
            query_RHTC, key_RHUC, value_RHUC, attn_mask=self.mask_R1TU, dropout_p=rate
        )
        return self.queries.pack(merge_heads(mixed_RHTC))


class _PaddedImageAttention:
    def __init__(self, queries: Packing, image_of_row: Tensor, num_paired: int, num_images: int) -> None:
        self.queries, self.image_of_row = queries, image_of_row
        self.num_paired, self.num_images = num_paired, num_images

    def __call__(self, query_SD: Tensor, key_value_KE: Tensor, num_heads: int, rate: float) -> Tensor:
        (query_RHTC,) = split_heads(self.queries.pad(query_SD), num_heads)
        images_BPE = key_value_KE.unflatten(0, (self.num_images, -1))
        tokens = [images_BPE] if self.num_paired else []  # for the first rows, and copies for the rest
        if query_RHTC.shape[0] > self.num_paired:
            tokens.append(images_BPE.index_select(0, self.image_of_row[self.num_paired :]))
        parts = [
            F.scaled_dot_product_attention(part, *split_heads(tokens_RPE, num_heads, 2), dropout_p=rate)
            for part, tokens_RPE in zip(query_RHTC.split([len(each) for each in tokens]), tokens, strict=True)
        ]
        mixed_RHTC = torch.cat(parts) if len(parts) > 1 else parts[0]
        return self.queries.pack(merge_heads(mixed_RHTC))

    def probabilities(self, query_SD: Tensor, key_value_KE: Tensor, num_heads: int) -> Tensor:
        """The weights of the values, fp32 [S, P], mean over the heads."""
        (query_RHTC,) = split_heads(self.queries.pad(query_SD), num_heads)
        key_BHPC, _ = split_heads(key_value_KE.unflatten(0, (self.num_images, -1)), num_heads, 2)
        key_RHPC = key_BHPC.index_select(0, self.image_of_row)
        scores_RHTP = query_RHTC.float() @ key_RHPC.float().transpose(2, 3) / query_RHTC.shape[-1] ** 0.5
        return self.queries.pack(scores_RHTP.softmax(-1).mean(1))


def split_heads(states: Tensor, num_heads: int, parts: int = 1) -> tuple[Tensor, ...]:
    """[R, T, parts*D] -> ``parts`` tensors [R, H, T, C]."""
    heads = states.unflatten(-1, (parts, num_heads, -1))
    return tuple(part.transpose(1, 2) for part in heads.unbind(2))


def merge_heads(heads: Tensor) -> Tensor:
    """[R, H, T, C] -> [R, T, D]."""
    return heads.transpose(1, 2).flatten(2)
