"""Hard negatives of a micro-batch: who gets one, which caption it is, and that all four objectives learn from it."""

from __future__ import annotations

import dataclasses
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.batch import Row
from model.build import build_objective
from model.config import FLMOptions
from model.plans.hard_negatives import HardNegatives, hard_negatives, resemblance
from tests.rounding import TINY
from tests.tiny_flm import MAX_TEXT_LENGTH, VOCABULARY, caption, images, pair_rows, tiny_config, tiny_flm

OBJECTIVES = ["flm", "mlm", "ar", "prefixlm"]


def likeness(one: list[int], other: list[int], captions: list[list[int]]) -> float:
    """The weighted Jaccard index, set by set."""
    weight = {token: math.log((1 + len(captions)) / sum(token in ids for ids in captions)) for token in {*one, *other}}
    return sum(weight[token] for token in {*one} & {*other}) / sum(weight.values()) if weight else 0.0


WORDS = st.lists(st.integers(3, 9), max_size=5)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(WORDS, st.sampled_from(["", "x", "y", "z"])), min_size=1, max_size=8), st.integers(0, 2**64 - 1)
)
def test_the_most_similar_caption_that_says_something_else_about_another_image(captions: list, seed: int) -> None:
    """Against a plain search; never an equal caption, never one of the same sample, never one without words."""
    rows = [Row([0, *words, 2], number, seed ^ number, "pair", key) for number, (words, key) in enumerate(captions)]
    found = {row.image: row for row in hard_negatives(rows, 1.0)}
    texts = [row.token_ids[1:-1] for row in rows]
    for number, row in enumerate(rows):
        usable = [
            other
            for other in range(len(rows))
            if texts[other] and texts[other] != texts[number] and not (row.sample and rows[other].sample == row.sample)
        ]
        usable = [other for other in usable if other != number]
        assert (number in found) == bool(usable)
        if usable:
            values = {other: round(likeness(texts[number], texts[other], texts), 6) for other in usable}
            best = [texts[other] for other in usable if values[other] >= max(values.values()) - 2e-6]
            assert found[number].token_ids[1:-1] in best
            assert found[number].role == "negative" and found[number].seed != row.seed


def test_rare_words_count_more_than_what_every_caption_says() -> None:
    every, rare = [3, 4, 5], 50
    captions = [[*every, rare, 20], [*every, 21, 22], [rare, 23, 24], *([*every, word] for word in range(30, 40))]
    values = resemblance(captions, [0])[0]
    assert values[0] == 1 and values[2] > values[1] > 0


def test_equals_are_drawn_from_the_seed_and_not_by_their_place() -> None:
    captions = [[0, 10, 11, 2], [0, 57, 58, 2], [0, 55, 56, 2], [0, 53, 54, 2]]
    chosen = {
        tuple(hard_negatives([Row(ids, number, seed) for number, ids in enumerate(captions)], 1.0)[0].token_ids)
        for seed in range(40)
    }
    assert chosen == {tuple(ids) for ids in captions[1:]}


def test_who_gets_one_follows_from_the_seed_alone() -> None:
    """At the nominal share; neighbours, order and further rows decide nothing but which caption it is."""
    rows = [Row(caption(4, seed), seed, 7919 * seed) for seed in range(2000)]
    found = {row.image for row in hard_negatives(rows, 0.25)}
    assert abs(len(found) / 2000 - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 2000)
    for part in (rows[:50], rows[50:53], rows[60:20:-1]):
        mine = {row.image for row in part}
        assert {row.image for row in hard_negatives(part, 0.25)} == found & mine
    assert hard_negatives(rows[:50], 0.0) == []


def test_the_choice_is_the_same_again_and_in_another_process() -> None:
    planner = tiny_flm(negatives="in_batch_hard", negative_share=1.0).planner
    rows, pictures = pair_rows([caption(k, k) for k in (4, 6, 5, 9)]), images(4)
    first, *others = (one(pictures, rows) for one in (planner, planner, pickle.loads(pickle.dumps(planner))))
    assert len(first.plan.text) == 8
    for other in others:
        assert all(
            torch.equal(getattr(other.plan, name), value)
            for name, value in vars(first.plan).items()
            if torch.is_tensor(value)
        )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_matches_its_hard_negatives(name: str) -> None:
    """Each pair and its negative have a target on the same image; the language targets stay what they were."""
    options = dict(name=name, **({"corruption_rate": 0.4} if name == "flm" else {}))
    hard, plain = tiny_flm(negatives="in_batch_hard", negative_share=1.0, **options), tiny_flm(**options)
    captions = [[0, 10, 11, 12, 2], [0, 10, 11, 12, 13, 2], [0, 20, 21, 2], [0, 20, 21, 22, 23, 24, 2]]
    nearest = [1, 0, 3, 2]
    rows, pictures = [*pair_rows(captions), Row([0, 2], 4, 0, "placeholder")], images(5)
    batch = hard.planner(pictures, rows)
    assert hard.planner.negative_share == 0 and hard.planner.full_stop is False
    assert batch.counts["itm"] == 8 and sorted(batch.terms["itm"].target.tolist()) == [0] * 4 + [1] * 4
    assert batch.plan.image_of_row.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert batch.plan.lengths[5:].tolist() == [len(captions[number]) for number in nearest]
    for row, number in enumerate(nearest, start=5):
        shown = batch.plan.text[row, : batch.plan.lengths[row]].tolist()
        same = [ours == theirs for ours, theirs in zip(shown, captions[number], strict=True)]
        assert all(same) or name == "mlm" and sum(same) > 1  # mlm hides some of its words
    alone = plain.planner(pictures, rows)
    assert alone.counts[name] == batch.counts[name] and torch.equal(alone.terms[name].target, batch.terms[name].target)
    hard.load_state_dict(plain.state_dict())
    losses = hard(batch)
    assert losses["itm"] > 0 and losses[name].item() == pytest.approx(plain(alone)[name].item(), rel=TINY)
    losses["itm"].backward()
    assert hard.itm_head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_without_a_usable_negative_has_none(name: str) -> None:
    """One pair beside a placeholder; captions that are all equal; captions of one sample; nothing but read rows."""
    objective = tiny_flm(name=name, negatives="in_batch_hard", negative_share=1.0)
    ids, other = caption(4, 1), caption(5, 2)
    batches = [
        [Row(ids, 0, 1), Row([0, 2], 1, 0, "placeholder")],
        [Row(ids, 0, 1), Row(ids, 1, 2)],
        [Row(ids, 0, 1, "pair", "k"), Row(other, 1, 2, "pair", "k")],
        [Row(ids, 0, 1, "read"), Row(other, 1, 2, "read")],
    ]
    for rows in batches:
        batch = objective.planner(images(2), rows)
        assert batch.counts["itm"] == 0 and len(batch.plan.text) >= 2
        assert torch.isfinite(objective(batch)["itm"])
    assert objective.planner(images(2), [Row(ids, 0, 1), Row(other, 1, 2)]).counts["itm"] == 4


def test_a_sample_that_has_a_negative_gets_no_other() -> None:
    objective = tiny_flm(negatives="in_batch_hard", negative_share=1.0)
    rows = [*pair_rows([caption(4, 1), caption(5, 2)]), Row(caption(3, 9), 1, 5, "negative")]
    assert objective.planner(images(2), rows).plan.image_of_row.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("behaviour", "options", "message"),
    [
        ("default", dict(itm_weight=0.0), "no effect with objective.itm_weight 0"),
        ("default", dict(negative_share=0.0), "no effect with objective.negative_share 0"),
        ("released", dict(), "no effect with model.behaviour released"),
    ],
)
def test_hard_negatives_that_would_do_nothing_are_refused(behaviour: str, options: dict, message: str) -> None:
    objective = FLMOptions(negatives="in_batch_hard", **options)
    with pytest.raises(ValueError, match=message):
        build_objective(tiny_config(behaviour), objective, VOCABULARY, MAX_TEXT_LENGTH)
    built = build_objective(tiny_config(behaviour), dataclasses.replace(objective, negatives="corpus"), VOCABULARY, 24)
    assert not isinstance(built.planner, HardNegatives)
