"""Which text states may be read from where: pure boolean functions of lengths and spans, True = may attend.

Legend: R rows, T padded length, n a row's length. States of a row stand at 0 (`<s>`), 1..n-2 (words), n-1 (`</s>`).
Every row of every mask, padding included, has at least one True, so that no softmax runs over nothing.

Example, n = 5, T = 6, rows = query position (`.` hidden):

    causal l2r     causal r2l     released l2r   released r2l
    1 . . . . .    1 1 1 1 1 .    1 1 1 1 1 .    1 1 1 1 1 .    <s>
    1 1 . . . .    . 1 1 1 1 .    . 1 . . . .    . 1 1 1 1 .    w1
    1 1 1 . . .    . . 1 1 1 .    . 1 1 . . .    . . 1 1 1 .    w2
    1 1 1 1 . .    . . . 1 1 .    . 1 1 1 . .    . . . 1 1 .    w3
    1 1 1 1 1 .    . . . . 1 .    . 1 1 1 1 .    . . . . 1 .    </s>
    1 1 1 1 1 .    . . . . 1 .    . 1 1 1 1 .    . 1 1 1 1 .    pad
"""

from __future__ import annotations

import torch
from torch import Tensor


def _grid(lengths: Tensor, num_positions: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row index i [1, T, 1], column index j [1, 1, T] and length n [R, 1, 1], to be compared with each other."""
    position = torch.arange(num_positions, device=lengths.device)
    return position[None, :, None], position[None, None, :], lengths[:, None, None]


def causal_streams(lengths: Tensor, num_positions: int) -> Tensor:
    """Masks of the default behaviour: plain causal attention in both directions, `<s>` and `</s>` are real starts.

    Args:
        lengths: int64 [R].
        num_positions: T.

    Returns:
        bool [2, R, T, T]: l2r, r2l.
    """
    i, j, n = _grid(lengths, num_positions)
    real = j < n
    l2r = (j <= i) & real
    r2l = (j >= torch.minimum(i, n - 1)) & real
    return torch.stack([l2r, r2l])


def prefix_stream(lengths: Tensor, prefix: Tensor, num_positions: int) -> Tensor:
    """One stream that is bidirectional up to its prefix and causal after it (specification section 4).

    Args:
        lengths: int64 [R].
        prefix: int64 [R], states 0..prefix-1 see each other; 0 is causal, the length is bidirectional.
        num_positions: T.

    Returns:
        bool [R, T, T].
    """
    i, j, n = _grid(lengths, num_positions)
    within = torch.maximum(i, j) < prefix[:, None, None]
    return (j < n) & ((j <= i) | within)


def released_streams(lengths: Tensor, num_positions: int) -> Tensor:
    """Masks of the released behaviour (specification section 3, masks F and R): `<s>` sees all and is seen by none.

    Args and returns as :func:`causal_streams`.
    """
    i, j, n = _grid(lengths, num_positions)
    real = j < n
    word = real & (j >= 1)
    first_row = (i == 0) & real
    l2r = first_row | ((i >= 1) & word & (j <= i))
    r2l = first_row | ((i >= 1) & word & ((j >= i) | (i >= n)))
    return torch.stack([l2r, r2l])


def reconstructor(lengths: Tensor, spans: Tensor, bos_visible: bool) -> Tensor:
    """What the reconstruction query at each position may read: l2r states left of its span, r2l states right of it.

    Row 0 is the CLS query and reads every real state of both streams.

    Args:
        lengths: int64 [R].
        spans: int64 [R, T, 2], the hidden span (lo, hi) of the query at each position; l2r states j < lo and r2l
            states j > hi are visible.
        bos_visible: whether queries other than the CLS query read the l2r state of `<s>`.

    Returns:
        bool [R, T, 2T]: columns 0..T-1 are l2r states, T..2T-1 are r2l states.
    """
    i, j, n = _grid(lengths, spans.shape[1])
    cls = i == 0
    real = j < n
    lo, hi = spans[..., :1], spans[..., 1:]
    left = real & (cls | ((j < lo) & ((j >= 1) | bos_visible)))
    right = real & (cls | (j > hi))
    return torch.cat([left, right], dim=-1)


def queries_and_two_texts(lengths: Tensor, num_queries: int, num_positions: int) -> Tensor:
    """What queries, a text that is read, and the same text as it is written may see (BLIP-2, figure 2).

    Queries see queries, the text that is read sees itself, and neither sees the other (contrastive); the written text
    sees the queries and itself up to each token (generation). Example with 2 queries, n = 2, T = 3:

        q q   r r .   w w .
        1 1   . . .   . . .   queries
        1 1   . . .   . . .
        . .   1 1 .   . . .   read
        . .   1 1 .   . . .
        . .   1 1 .   . . .   pad
        1 1   . . .   1 . .   written
        1 1   . . .   1 1 .
        1 1   . . .   1 1 .   pad

    Args:
        lengths: int64 [R].
        num_queries: Q.
        num_positions: T.

    Returns:
        bool [R, Q + 2T, Q + 2T].
    """
    i, j, n = _grid(lengths, num_positions)
    real = (j < n).expand(-1, num_positions, -1)
    first = num_queries + num_positions
    mask = lengths.new_zeros((len(lengths), first + num_positions, first + num_positions), dtype=torch.bool)
    mask[:, :num_queries, :num_queries] = True
    mask[:, first:, :num_queries] = True
    mask[:, num_queries:first, num_queries:first] = real
    mask[:, first:, first:] = real & (j <= i)
    return mask


def queries_and_text(lengths: Tensor, num_queries: int, num_positions: int) -> Tensor:
    """Queries and a text that all see each other (matching); args as above, bool [R, Q + T, Q + T]."""
    real = torch.arange(num_positions, device=lengths.device) < lengths[:, None]
    keys = torch.cat([real.new_ones((len(lengths), num_queries)), real], dim=1)
    return keys[:, None].expand(-1, keys.shape[1], -1)
