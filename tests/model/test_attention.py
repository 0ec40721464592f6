"""Both ways to attend, through the padded grid and row by row, against attention written out query by query."""

from __future__ import annotations

import dataclasses
import math
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.attention import Packing, image_attention, text_attention
from model.build import build_objective
from model.config import objective_options
from model.cpu import door, row_attention
from model.objectives.pretraining import Pretraining
from tests.tiny_flm import MAX_TEXT_LENGTH, VOCABULARY, caption, images, pair_rows, tiny_config

HEADS, WIDTH = 2, 6
BOTH_WAYS = (0.0, 0.1)  # highest dropout rate: through the grid, row by row
ROW_LENGTHS = st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any)


def attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """[S, D], [K, D], [K, D], bool [S, K] -> [S, D]: a loop over queries and heads; nothing to see gives 0."""
    mixed = 0 * (query + key.sum() + value.sum())  # has gradients also where nothing is seen
    size = WIDTH // HEADS
    for i in range(len(query)):
        for head in range(HEADS):
            part, seen = slice(head * size, (head + 1) * size), visible[i].nonzero()[:, 0]
            if len(seen):
                scores = key[seen, part] @ query[i, part] / math.sqrt(size)
                mixed[i, part] = scores.softmax(0) @ value[seen, part]
    return mixed


def packing_of(lengths: list[int], num_positions: int, generator: torch.Generator) -> Packing:
    """Each row's states at random places of its row, in ascending order."""
    cells = [
        row * num_positions + torch.randperm(num_positions, generator=generator)[:length].sort().values
        for row, length in enumerate(lengths)
    ]
    return Packing(torch.cat(cells), len(lengths), num_positions)


def random_mask(queries: Packing, keys: Packing, generator: torch.Generator) -> Tensor:
    """bool [R, T, U], True only where a key is held; some queries see nothing."""
    drawn = torch.rand(keys.num_rows, queries.num_positions, keys.num_positions, generator=generator) > 0.3
    return drawn & keys.pad(torch.ones(len(keys.index)))[:, None].bool()


def visible_cells(queries: Packing, keys: Packing, mask: Tensor) -> Tensor:
    (row, place), (other, key_place) = queries.cells(), keys.cells()
    return (row[:, None] == other[None]) & mask[row[:, None], place[:, None], key_place[None]]


@pytest.mark.parametrize("merged", [0, 40, 10**6])
@given(ROW_LENGTHS, st.data())
@settings(max_examples=25, deadline=None)
def test_both_ways_over_text_equal_attention_query_by_query(merged: int, lengths: list[int], data: st.DataObject):
    """Invariants 3 to 5: whatever rows share a block, nobody reads another row or a hidden key; the blind get 0."""
    key_lengths = data.draw(st.lists(st.integers(0, 5), min_size=len(lengths), max_size=len(lengths)).filter(any))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    queries, keys = packing_of(lengths, 5, generator), packing_of(key_lengths, 6, generator)
    mask = random_mask(queries, keys, generator)
    query = torch.randn(sum(lengths), WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    key_value = torch.randn(sum(key_lengths), 2 * WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    expected = attention(query, *key_value.split(WIDTH, 1), visible_cells(queries, keys, mask))
    out = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    gradients = torch.autograd.grad(expected, (query, key_value), out)
    for rate in BOTH_WAYS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(row_attention, "MERGED_FOR_NOTHING", merged)
            attend = text_attention(queries, keys, mask, len(lengths), rate)
        mixed = attend(query, key_value, HEADS, 0.0)
        torch.testing.assert_close(mixed, expected)
        torch.testing.assert_close(torch.autograd.grad(mixed, (query, key_value), out), gradients)


@given(ROW_LENGTHS, st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_states_attend_to_states_of_their_own_stream(lengths: list[int], seed: int):
    """Two streams of a caption stand together in the packed states, in rows r and R + r of the grid."""
    generator, num_rows = torch.Generator().manual_seed(seed), len(lengths)
    index = torch.cat([packing_of(lengths, 5, generator).index, packing_of(lengths, 5, generator).index + num_rows * 5])
    index = index[(index // 5 % num_rows).argsort(stable=True)]
    packing = Packing(index, 2 * num_rows, 5)
    mask = random_mask(packing, packing, generator)
    packed = torch.randn(len(index), 3 * WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    expected = attention(*packed.split(WIDTH, 1), visible_cells(packing, packing, mask))
    (gradient,) = torch.autograd.grad(expected.square().sum(), packed)
    for rate in BOTH_WAYS:
        mixed = text_attention(packing, packing, mask, num_rows, rate)(packed, None, HEADS, 0.0)
        torch.testing.assert_close(mixed, expected)
        torch.testing.assert_close(torch.autograd.grad(mixed.square().sum(), packed)[0], gradient)


@pytest.mark.parametrize(
    ("image_of_row", "num_paired"),
    [([0, 1, 2], 3), ([0, 1, 2, 1], 3), ([2, 2, 0], 0), ([1], 0)],
    ids=["own images", "a negative", "any images, one twice and one by nobody", "one row"],
)
def test_both_ways_over_images_equal_attention_query_by_query(image_of_row: list[int], num_paired: int):
    generator = torch.Generator().manual_seed(1)
    queries = packing_of([2, 4, 1, 3][: len(image_of_row)], 5, generator)
    owner = torch.tensor(image_of_row)
    query = torch.randn(len(queries.index), WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    key_value = torch.randn(3 * 4, 2 * WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    visible = owner[queries.cells()[0]][:, None] == torch.arange(12)[None] // 4
    expected = attention(query, *key_value.split(WIDTH, 1), visible)
    gradients = torch.autograd.grad(expected.square().sum(), (query, key_value))
    for rate in BOTH_WAYS:
        attend = image_attention(queries, owner, num_paired, 3, 4, rate)
        mixed = attend(query, key_value, HEADS, 0.0)
        torch.testing.assert_close(mixed, expected)
        torch.testing.assert_close(torch.autograd.grad(mixed.square().sum(), (query, key_value)), gradients)


def test_dropped_weights_are_those_of_the_factors(monkeypatch: pytest.MonkeyPatch):
    """Softmax, times factors, times values: by autograd with the same factors, gradients included."""
    lengths, generator = [3, 2, 4], torch.Generator().manual_seed(2)
    packing = packing_of(lengths, 4, generator)
    mask = random_mask(packing, packing, generator)
    packed = torch.randn(9, 3 * WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    drawn = (torch.rand(HEADS, 9, 9, generator=generator, dtype=torch.float64) > 0.3) / 0.7
    attend = text_attention(packing, packing, mask, 3, 0.3)  # rows as short as these share one block
    monkeypatch.setattr(row_attention, "dropout_factors", lambda shape, rate, dtype: drawn.view(shape))
    query, key, value = packed.unflatten(1, (3 * HEADS, -1)).transpose(0, 1).split(HEADS)
    visible = visible_cells(packing, packing, mask)
    scores = (query @ key.mT / math.sqrt(WIDTH // HEADS)).masked_fill(~visible, -math.inf)
    weights = scores.softmax(-1).masked_fill(~visible.any(1, keepdim=True), 0)
    expected = ((weights * drawn) @ value).transpose(0, 1).flatten(1)
    mixed = attend(packed, None, HEADS, 0.3)
    torch.testing.assert_close(mixed, expected)
    gradients = [torch.autograd.grad(each.square().sum(), packed)[0] for each in (mixed, expected)]
    torch.testing.assert_close(*gradients)


def test_rows_are_attended_one_by_one_only_on_a_cpu_that_drops_weights():
    packing = packing_of([2, 1], 3, torch.Generator())

    def way(device: str, rate: float) -> list[bool]:
        cells = Packing(packing.index.to(device), 2, 3)
        mask, owner = torch.ones(2, 3, 3, dtype=torch.bool, device=device), torch.zeros(2, dtype=int, device=device)
        made = text_attention(cells, cells, mask, 2, rate), image_attention(cells, owner, 0, 1, 4, rate)
        return [isinstance(each, row_attention.RowAttention) for each in made]

    assert way("cpu", 0.1) == [True, True]
    assert way("cpu", 0.0) == way("meta", 0.1) == [False, False]
    with door.shut():
        assert way("cpu", 0.1) == [False, False]
    assert way("cpu", 0.1) == [True, True]


def training_objective(name: str, rate: float) -> Pretraining:
    torch.manual_seed(0)
    config = objective_options(name, **({"corruption_rate": 0.4} if name == "flm" else {}))
    return build_objective(tiny_config(dropout=rate), config, VOCABULARY, MAX_TEXT_LENGTH).double().train()


@pytest.mark.parametrize("name", ["flm", "mlm", "ar", "prefixlm"])
def test_training_with_hardly_any_dropout_equals_training_without(name: str):
    """The whole network in double, negatives included: row by row and through the grid, against no dropout at all.

    At this rate nothing is dropped and what is kept is multiplied by exactly 1. What is left is the rounding of the
    heads, which turn logits into losses in fp32: each logit is rounded, shifted by a rounded maximum, its exponential
    rounded and divided by a rounded sum, so that a gradient with respect to logits is off by 4 roundings of numbers as
    large as the largest logit. Everything behind it is linear.
    """
    rows = pair_rows([caption(4, 1), caption(9, 2), caption(1, 3)])
    rows.append(dataclasses.replace(pair_rows([caption(6, 4)])[0], image=1, role="negative"))
    results, largest = [], 1.0
    for rate, is_shut in ((1e-300, False), (1e-300, True), (0.0, False)):
        with door.shut() if is_shut else nullcontext():
            objective = training_objective(name, rate)
            batch = objective.planner(images(3), rows)
            sums = objective(batch)
            gradients = torch.autograd.grad(sum(sums.values()), tuple(objective.parameters()), allow_unused=True)
        results.append([*sums.values(), *(each for each in gradients if each is not None)])
        output = objective.net(batch)
        states = torch.cat([getattr(output, term.source) for term in batch.terms.values()])
        logits = objective.lm_head.logits(states)
        largest = max(largest, logits.abs().max().item())
    tolerance = 4 * largest * torch.finfo(torch.float32).eps
    for by_rows, through_grid, without in zip(*results, strict=True):
        assert (by_rows - without).norm() <= tolerance * without.norm()
        assert (through_grid - without).norm() <= tolerance * without.norm()
