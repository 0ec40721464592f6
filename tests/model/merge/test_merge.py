"""Merging: what the release computes, what a triple loop computes, and what must stay as it is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.merge.apply import membership, merge_mean, merge_sizes, merge_weighted
from model.merge.plan import MergePlan, bipartite_plan, most_merges
from model.merge.schedule import clamped_merges, merges_to_budget, sloped_merges, tokens_after
from tests.oracle import GRADIENT, assert_near, load_oracle
from tests.rounding import rounding

NUM_CASES = 10


def plain_merge(tokens: Tensor, metric: Tensor, num_merges: int, protect_first: bool) -> list[list[list[int]]]:
    """By loops and Python's own sort: for each image, for each place after the merge, the tokens that ended there."""
    groups_of_images = []
    for vectors in metric.double():
        lengths = [float(vector.norm()) or 1.0 for vector in vectors]
        cosine = lambda a, b, v=vectors, n=lengths: float(v[a] @ v[b]) / n[a] / n[b]  # noqa: E731
        even, odd = range(0, len(vectors), 2), range(1, len(vectors), 2)
        movable = [a for a in even if not (protect_first and a == 0)] if odd else []
        nearest = {a: max(odd, key=lambda b, a=a: cosine(a, b)) for a in movable}
        order = sorted(movable, key=lambda a: -cosine(a, nearest[a]))
        gone = order[: min(num_merges, most_merges(len(vectors), protect_first))]
        stay = [a for a in even if a not in gone]
        if not protect_first:
            stay = order[len(gone) :]
        groups = [[a] for a in stay] + [[b, *(a for a in gone if nearest[a] == b)] for b in odd]
        groups_of_images.append(groups if gone else [[t] for t in range(len(vectors))])
    return groups_of_images


@st.composite
def merges(draw: st.DrawFn) -> tuple[Tensor, int, bool]:
    """A metric without near ties, how many to merge, whether the first token is protected."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(2, 6)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    metric = torch.randn(*shape, generator=generator)
    if draw(st.booleans()):
        metric[:, draw(st.integers(0, shape[1] - 1))] = 0
    return metric, draw(st.integers(0, 14)), draw(st.booleans())


@given(merges())
def test_equal_to_loops(case: tuple[Tensor, int, bool]) -> None:
    metric, num_merges, protect_first = case
    tokens = torch.randn(*metric.shape[:2], 5, dtype=torch.float64)
    plan = bipartite_plan(metric, num_merges, protect_first)
    groups = plain_merge(tokens, metric, num_merges, protect_first)
    expected = torch.stack([torch.stack([image[g].mean(0) for g in each]) for image, each in zip(tokens, groups)])
    torch.testing.assert_close(merge_mean(tokens, plan), expected)
    places = membership([plan], *metric.shape[:2])
    for image, each in enumerate(groups):
        for place, group in enumerate(each):
            assert set((places[image] == place).nonzero()[:, 0].tolist()) == set(group)


@given(merges(), st.lists(st.integers(0, 6), min_size=1, max_size=4))
def test_mass_is_conserved(case: tuple[Tensor, int, bool], schedule: list[int]) -> None:
    """However often tokens are merged: a token is the mean of its patches, sizes count them, nothing is lost."""
    metric, _, protect_first = case
    patches = torch.randn(*metric.shape[:2], 5, dtype=torch.float32)
    tokens, sizes, plans = patches, torch.ones(metric.shape[:2]), []
    for num_merges in schedule:
        plans.append(bipartite_plan(tokens, num_merges, protect_first))
        assert torch.equal(merge_sizes(sizes, plans[-1]), merge_weighted(tokens, sizes, plans[-1])[1])
        tokens, sizes = merge_weighted(tokens, sizes, plans[-1])
    places = membership(plans, *metric.shape[:2])
    assert torch.equal(sizes.sum(1), torch.full((len(metric),), float(metric.shape[1])))
    for image in range(len(metric)):
        for place in range(tokens.shape[1]):
            behind = places[image] == place
            assert sizes[image, place] == behind.sum()
            atol = rounding(metric.shape[1]) * 5  # patches of up to 5 standard deviations
            torch.testing.assert_close(tokens[image, place], patches[image, behind].mean(0), rtol=0, atol=atol)
    if protect_first:
        assert torch.equal(tokens[:, 0], patches[:, 0]), "the class token is as it was"


@given(merges())
def test_an_order_of_equal_tokens_changes_nothing(case: tuple[Tensor, int, bool]) -> None:
    metric, num_merges, protect_first = case
    num_tokens = metric.shape[1]
    twins = [t for t in range(num_tokens) if t % 4 in (2, 3)]  # at even and odd places
    metric[:, twins] = metric[:, :1] + 1
    swapped = torch.arange(num_tokens)
    swapped[twins] = torch.tensor(twins[::-1], dtype=torch.int64)
    tokens = torch.cat([metric, metric**2], dim=-1)
    once, again = (
        merge_mean(t, bipartite_plan(m, num_merges, protect_first))
        for t, m in ((tokens, metric), (tokens[:, swapped], metric[:, swapped]))
    )
    assert torch.equal(once, again)


@pytest.mark.parametrize("number", range(NUM_CASES))
def test_equal_to_the_release(number: int) -> None:
    """Plans, merged tokens and gradients of the public release (its inputs have no near ties)."""
    cases = load_oracle("01_bipartite_cases.pt", "evlgen")
    assert len(cases) == NUM_CASES
    case = cases[number]
    plan = bipartite_plan(case["metric"], case["r_requested"], case["class_token"])
    if not case["r_used"]:
        assert plan is None and torch.equal(case["merged_mean"], case["x"])
        return
    assert plan.merged.shape[1] == case["r_used"]
    assert torch.equal(plan.kept[:, : case["unm_idx"].shape[1]], 2 * case["unm_idx"])
    assert torch.equal(plan.merged, 2 * case["src_idx"])
    assert torch.equal(plan.into, case["unm_idx"].shape[1] + case["dst_idx"])
    tokens = case["x"].clone().requires_grad_()
    merged = merge_mean(tokens, plan)
    (merged * case["grad_weight"]).sum().backward()
    assert_near(merged, case["merged_mean"])
    assert_near(tokens.grad, case["grad_x"], GRADIENT)
    assert torch.equal(merge_sizes(torch.ones(tokens.shape[:2]), plan), case["counts"])


def test_a_plan_has_no_gradient_and_is_made_in_single_precision() -> None:
    metric = torch.randn(2, 9, 8).bfloat16().requires_grad_()
    plan = bipartite_plan(metric, 3)
    assert isinstance(plan, MergePlan)
    expected = bipartite_plan(metric.float(), 3)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(plan, expected))
    merged, sizes = merge_weighted(torch.randn(2, 9, 8).bfloat16(), torch.ones(2, 9), plan)
    assert (merged.dtype, sizes.dtype) == (torch.bfloat16, torch.float32)


@given(st.integers(2, 300), st.integers(1, 14), st.data(), st.booleans())
def test_budgets_are_kept(num_tokens: int, num_layers: int, data: st.DataObject, protect_first: bool) -> None:
    everything = clamped_merges(num_tokens, [num_tokens] * num_layers, protect_first)
    fewest = tokens_after(num_tokens, everything)[-1]
    budget = data.draw(st.integers(fewest, num_tokens))
    merges = merges_to_budget(num_tokens, num_layers, budget, protect_first)
    left = tokens_after(num_tokens, merges)
    assert left[-1] == budget and len(merges) == num_layers
    for before, number in zip([num_tokens, *left], merges):
        assert 0 <= number <= most_merges(before, protect_first)
    if 4 * (num_tokens - budget) <= num_layers * budget:  # no layer is near its limit
        assert max(merges) - min(merges) <= 1
    with pytest.raises(ValueError, match=f"{fewest} can at least"):
        merges_to_budget(num_tokens, num_layers, fewest - 1, protect_first)


def test_the_schedule_of_the_release() -> None:
    left = tokens_after(257, clamped_merges(257, sloped_merges(12, 19, 0)))
    assert left == [238, 219, 200, 181, 162, 143, 124, 105, 86, 67, 48, 29]
    assert merges_to_budget(257, 12, 29) == (19,) * 12


def test_slopes_are_those_of_the_release() -> None:
    """Its helper of schedules, which nothing calls there."""
    schedules = load_oracle("01b_parse_r.pt", "evlgen")
    slopes = {"(12, 19)": 0, "(12, (19, 0))": 0, "(12, (19, -1))": -1, "(12, (19, 1))": 1, "(12, (19, 0.5))": 0.5}
    assert schedules.keys() == slopes.keys()
    for name, slope in slopes.items():
        assert list(sloped_merges(12, 19, slope)) == schedules[name]


@given(st.integers(1, 14), st.integers(0, 40), st.floats(-1, 1))
def test_a_slope_keeps_the_mean(num_layers: int, mean: int, slope: float) -> None:
    """To a merge a layer, by which each is rounded down; no layer merges less than none."""
    merges = sloped_merges(num_layers, mean, slope)
    assert merges[0] == int(mean * (1 - slope)) and min(merges) >= 0
    assert list(merges) == sorted(merges, reverse=merges[0] > mean)
    if num_layers > 1:
        assert mean * num_layers - num_layers < sum(merges) <= mean * num_layers
