"""Mask functions against triple loops that spell out the rules of the specification (section 3)."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import masks

LENGTHS = st.lists(st.integers(2, 9), min_size=1, max_size=3)


def rows_of(text: str) -> list[list[bool]]:
    return [[cell == "1" for cell in line.split()] for line in text.strip().splitlines()]


def test_released_masks_match_the_specification_example():
    """The matrices printed in section 3 for n = 6, L = 8."""
    l2r, r2l = masks.released_streams(torch.tensor([6]), 8)
    assert l2r[0].tolist() == rows_of(
        """1 1 1 1 1 1 0 0
           0 1 0 0 0 0 0 0
           0 1 1 0 0 0 0 0
           0 1 1 1 0 0 0 0
           0 1 1 1 1 0 0 0
           0 1 1 1 1 1 0 0
           0 1 1 1 1 1 0 0
           0 1 1 1 1 1 0 0"""
    )
    assert r2l[0].tolist() == rows_of(
        """1 1 1 1 1 1 0 0
           0 1 1 1 1 1 0 0
           0 0 1 1 1 1 0 0
           0 0 0 1 1 1 0 0
           0 0 0 0 1 1 0 0
           0 0 0 0 0 1 0 0
           0 1 1 1 1 1 0 0
           0 1 1 1 1 1 0 0"""
    )
    position = torch.arange(8)
    spans = torch.stack([position, position], -1)[None]
    reconstructor = masks.reconstructor(torch.tensor([6]), spans, bos_visible=False)[0, :6]
    assert reconstructor.tolist() == rows_of(
        """1 1 1 1 1 1 0 0 1 1 1 1 1 1 0 0
           0 0 0 0 0 0 0 0 0 0 1 1 1 1 0 0
           0 1 0 0 0 0 0 0 0 0 0 1 1 1 0 0
           0 1 1 0 0 0 0 0 0 0 0 0 1 1 0 0
           0 1 1 1 0 0 0 0 0 0 0 0 0 1 0 0
           0 1 1 1 1 0 0 0 0 0 0 0 0 0 0 0"""
    )


@given(LENGTHS, st.integers(9, 12))
@settings(max_examples=30, deadline=None)
def test_causal_streams_see_one_side_only(lengths: list[int], num_positions: int):
    """Invariant 4: every row, padding included, sees something; real rows see exactly their own side."""
    streams = masks.causal_streams(torch.tensor(lengths), num_positions)
    assert streams.dtype == torch.bool and streams.any(-1).all()
    for row, n in enumerate(lengths):
        for i in range(n):
            for j in range(num_positions):
                assert streams[0, row, i, j].item() == (j <= i)
                assert streams[1, row, i, j].item() == (i <= j < n)


@given(LENGTHS, st.data())
@settings(max_examples=30, deadline=None)
def test_reconstructor_hides_the_span_and_nothing_else(lengths: list[int], data: st.DataObject):
    num_positions = 10
    spans = torch.zeros(len(lengths), num_positions, 2, dtype=torch.int64)
    for row, n in enumerate(lengths):
        for i in range(1, n - 1):
            lo = data.draw(st.integers(1, i))
            spans[row, i] = torch.tensor([lo, data.draw(st.integers(i, n - 2))])
    mask = masks.reconstructor(torch.tensor(lengths), spans, bos_visible=True)
    for row, n in enumerate(lengths):
        for i in range(1, n - 1):
            lo, hi = spans[row, i].tolist()
            left = [j for j in range(num_positions) if mask[row, i, j]]
            right = [j for j in range(num_positions) if mask[row, i, num_positions + j]]
            assert left == list(range(lo)) and right == list(range(hi + 1, n))
        assert mask[row, 0].tolist() == [j % num_positions < n for j in range(2 * num_positions)]
