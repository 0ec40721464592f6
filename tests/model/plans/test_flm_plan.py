"""Planning: which states are computed, what is predicted, and how much is hidden."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.batch import Row
from model.plans.builder import row_generator
from model.plans.flm import FLMPlanner, ReleasedPlanner
from model.plans.spans import centred_spans, uniform_spans
from tests.tiny_flm import VOCABULARY, caption, images, pair_rows


def planner(rate: float = 0.3) -> FLMPlanner:
    return FLMPlanner(VOCABULARY, rate, negative_share=0.5)


@given(st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**64 - 1))
@settings(max_examples=200, deadline=None)
def test_uniform_spans_hold_their_target_and_stay_inside_the_words(num_words: int, rate: float, seed: int):
    spans = uniform_spans(num_words + 2, rate, row_generator(seed))
    target = np.arange(1, num_words + 1)
    assert spans.shape == (num_words, 2)
    assert (spans[:, 0] >= 1).all() and (spans[:, 1] <= num_words).all()
    assert (spans[:, 0] <= target).all() and (target <= spans[:, 1]).all()


@pytest.mark.parametrize("num_words", [4, 9, 20])
@pytest.mark.parametrize("rate", [0.15, 0.3, 0.5, 0.7, 1.0])
def test_hidden_share_is_nominal_at_every_position(num_words: int, rate: float):
    """The defect of the release (section 3.1): targets at the ends were corrupted less. Here every position gets it."""
    samples = 4000
    hidden = np.zeros(num_words)
    generator = row_generator(5)
    for _ in range(samples):
        spans = uniform_spans(num_words + 2, rate, generator)
        hidden += spans[:, 1] - spans[:, 0] + 1
    share = hidden / samples / num_words
    probability = max(rate * num_words - 1, 0) / (num_words - 1)
    error = np.sqrt((num_words - 1) * probability * (1 - probability) / samples) / num_words
    assert np.abs(share - max(rate, 1 / num_words)).max() <= 5 * error + 1e-9


def test_spans_are_not_centred():
    """At the same size a span must sit at every allowed place equally often."""
    generator = row_generator(0)
    counts: dict[int, int] = {}
    for _ in range(6000):
        lo, hi = uniform_spans(11, 0.5, generator)[4]  # target 5 of 9 words
        if hi - lo + 1 == 4:
            counts[lo] = counts.get(lo, 0) + 1
    assert set(counts) == {2, 3, 4, 5}
    expected = sum(counts.values()) / 4
    assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())


@pytest.mark.parametrize(
    ("length", "rate", "first", "middle", "last"),
    [(12, 0.3, 0.228, 0.300, 0.195), (20, 0.5, 0.448, 0.501, 0.277), (8, 0.7, 0.557, 0.699, 0.419)],
)
def test_released_spans_have_the_measured_rates(length: int, rate: float, first: float, middle: float, last: float):
    """Rates measured on the release (table of section 3.1): nominal in the middle only."""
    generator, samples = row_generator(1), 4000
    hidden = np.zeros(length - 1)
    for _ in range(samples):
        spans = centred_spans(length, 50, rate, generator)
        for target in range(1, length):
            lo, hi = spans[target - 1]
            hidden[target - 1] += sum(1 for token in range(1, length) if lo <= token <= hi)
    share = hidden / samples / (length - 1)
    assert share[0] == pytest.approx(first, abs=0.012)
    assert share[(length - 1) // 2] == pytest.approx(middle, abs=0.012)
    assert share[-1] == pytest.approx(last, abs=0.012)


def test_targets_of_the_default_behaviour():
    """Every word is reconstructed once; l2r predicts all but `<s>`, r2l all words; labels are the right tokens."""
    rows = pair_rows([caption(5, 1), caption(1, 2), caption(3, 3)])
    batch = planner()(images(3), rows)
    assert batch.counts == {"flm": 9, "l2r": 12, "r2l": 9, "itm": 0}
    text = batch.plan.text.flatten()
    length = batch.plan.text.shape[1]
    cells = {"flm": batch.plan.query_index, "l2r": batch.plan.l2r_index, "r2l": batch.plan.r2l_index}
    offset = {"flm": 0, "l2r": 1, "r2l": -1}
    for name, term in batch.terms.items():
        if name != "itm":
            assert torch.equal(text[cells[name][term.position] + offset[name]], term.target)
    targets = {name: sorted((cells[name][batch.terms[name].position] + offset[name]).tolist()) for name in cells}
    words = [row * length + i for row, ids in enumerate(rows) for i in range(1, len(ids.token_ids) - 1)]
    ends = [row * length + len(ids.token_ids) - 1 for row, ids in enumerate(rows)]
    assert targets["flm"] == words and targets["r2l"] == words and targets["l2r"] == sorted(words + ends)


@pytest.mark.parametrize("rate", [0.01, 0.25, 0.5, 0.9])
def test_a_share_of_the_words_is_reconstructed(rate: float) -> None:
    """Each equally often, at least one; states, streams' targets and the spans of those left are what they were."""
    whole, part = planner(), FLMPlanner(VOCABULARY, 0.3, negative_share=0.5, query_rate=rate)
    num_words, samples = 6, 2000
    counts = np.zeros(num_words)
    for seed in range(samples):
        rows = [Row(caption(num_words, 1), 0, seed=seed, role="pair")]
        expected, found = whole(images(1), rows), part(images(1), rows)
        queries = found.plan.query_index
        counts[queries.numpy() - 1] += 1
        assert torch.equal(found.plan.query_span, expected.plan.query_span[queries - 1])
        assert torch.equal(found.terms["flm"].target, found.plan.text.flatten()[queries])
        for name in ("l2r", "r2l"):
            assert torch.equal(found.terms[name].target, expected.terms[name].target)
            assert torch.equal(getattr(found.plan, f"{name}_index"), getattr(expected.plan, f"{name}_index"))
    share = max(rate, 1 / num_words)
    assert np.abs(counts / samples - share).max() < 5 * np.sqrt(share * (1 - share) / samples)


@pytest.mark.parametrize("rate", [0.01, 0.5])
def test_streams_predict_a_share_of_the_words(rate: float) -> None:
    """Each equally often, at least one, right ones; states, queries and spans are what they were."""
    whole, part = planner(), FLMPlanner(VOCABULARY, 0.3, negative_share=0.5, stream_rate=rate)
    num_words, samples = 6, 2000
    counts = {"l2r": np.zeros(num_words + 2), "r2l": np.zeros(num_words + 2)}
    for seed in range(samples):
        rows = [Row(caption(num_words, 1), 0, seed=seed, role="pair")]
        expected, found = whole(images(1), rows).plan, part(images(1), rows)
        for field in ("l2r_index", "r2l_index", "query_index", "query_span"):
            assert torch.equal(getattr(found.plan, field), getattr(expected, field))
        for name, offset in (("l2r", 1), ("r2l", -1)):
            predicted = getattr(found.plan, f"{name}_index")[found.terms[name].position] + offset
            counts[name][predicted.numpy()] += 1
            assert torch.equal(found.terms[name].target, found.plan.text.flatten()[predicted])
    for name, places in (("l2r", np.arange(1, num_words + 2)), ("r2l", np.arange(1, num_words + 1))):
        share = max(rate, 1 / len(places))
        assert np.abs(counts[name][places] / samples - share).max() < 5 * np.sqrt(share * (1 - share) / samples)
        assert counts[name].sum() == counts[name][places].sum()


@pytest.mark.parametrize("every_word", [False, True])
def test_a_share_of_the_captions_is_reconstructed(every_word: bool) -> None:
    """The others have their forward stream alone, and the states that matching or a contrast reads; nothing moves."""
    settings = {"negative_share": 0.5, "every_word": every_word}
    whole, part = (
        FLMPlanner(VOCABULARY, 0.3, **settings),
        FLMPlanner(VOCABULARY, 0.3, reconstruction_share=0.25, **settings),
    )
    samples, reconstructed = 2000, 0
    for seed in range(samples):
        judged = [Row(caption(4, 2), 0, seed=1, role="negative")] if seed % 2 else []
        rows = [Row(caption(6, 1), 0, seed=seed, role="pair"), *judged]
        expected, found = whole(images(1), rows), part(images(1), rows)
        assert torch.equal(found.plan.l2r_index, expected.plan.l2r_index)
        assert torch.equal(found.terms["l2r"].target, expected.terms["l2r"].target)
        assert torch.equal(found.terms["itm"].target, expected.terms["itm"].target)
        if found.counts["flm"]:
            reconstructed += 1
            for name in ("flm", "r2l"):
                assert torch.equal(found.terms[name].target, expected.terms[name].target)
            for field in ("r2l_index", "query_index", "query_span"):
                assert torch.equal(getattr(found.plan, field), getattr(expected.plan, field))
        else:
            assert found.counts["r2l"] == 0 and found.counts["itm"] == 2 * len(judged)
            assert len(found.plan.query_index) == found.counts["itm"]
            kept = len(expected.plan.r2l_index) if judged or every_word else 0
            assert len(found.plan.r2l_index) == kept
    assert abs(reconstructed / samples - 0.25) < 5 * np.sqrt(0.25 * 0.75 / samples)


def test_negatives_and_placeholders_carry_no_language_targets():
    rows = [*pair_rows([caption(4, 1), caption(6, 2)]), Row(caption(5, 3), 1, seed=7, role="negative")]
    batch = planner()(images(2), rows)
    assert batch.counts["flm"] == 10 and batch.counts["itm"] == 2
    row_of_query = batch.plan.query_index[batch.terms["itm"].position] // batch.plan.text.shape[1]
    assert dict(zip(row_of_query.tolist(), batch.terms["itm"].target.tolist(), strict=True)) == {1: 1, 2: 0}

    empty = planner()(images(2), [Row([0, 2], 0, 0, "placeholder"), Row([0, 2], 1, 0, "placeholder")])
    assert set(empty.counts.values()) == {0}


@given(st.lists(st.integers(1, 18), min_size=1, max_size=5), st.sampled_from([0.0, 0.4, 1.0]))
@settings(max_examples=40, deadline=None)
def test_a_rows_plan_does_not_depend_on_its_neighbours(lengths: list[int], rate: float):
    """Invariants 1 and 5: spans and targets of a row are the same alone and in any batch."""
    rows = [Row(caption(k, seed), seed, seed=99 * seed) for seed, k in enumerate(lengths)]
    together = planner(rate)(images(len(rows)), rows)
    spans = []
    for row in rows:
        alone = planner(rate)(images(1), [Row(row.token_ids, 0, row.seed)])
        spans.append(alone.plan.query_span)
    assert torch.equal(together.plan.query_span, torch.cat(spans))


def test_released_counts_include_the_quirks():
    """Section 5: `</s>` is reconstructed, w1 is not predicted by l2r, each padded row adds a leaking r2l target."""
    plan = ReleasedPlanner(VOCABULARY, 0.0, max_text_length=8)
    batch = plan(images(2), pair_rows([caption(3, 1), caption(6, 2)]))  # lengths 5 (padded) and 8 (full)
    assert batch.counts == {"flm": 4 + 7, "l2r": 3 + 6, "r2l": (3 + 1) + 6}


def test_released_drops_a_target_that_would_see_nothing():
    """Invariant 4: an empty caption's only query has nothing to read; it must not attend to everything instead."""
    batch = ReleasedPlanner(VOCABULARY, 0.0, max_text_length=8)(images(1), [Row([0, 2], 0, 0)])
    assert batch.counts["flm"] == 0
