"""Who is ranked among whom: texts that come with an image, pairs of the micro-batch."""

from __future__ import annotations

import itertools

from model.batch import Row
from model.plans.hard_negatives import resemblance
from model.plans.ranking import MISSING, CandidatePlanner, InBatchPlanner
from tests.tiny_flm import caption, images, tiny_flm

PLANNER = tiny_flm().planner


def looked_up(batch, term: str) -> list[list[tuple[int, tuple[int, ...]]]]:
    """(image, words) of each candidate of each ranking, found by way of the CLS query's place in the plan."""
    plan, found = batch.plan, []
    for positions in batch.terms[term].position.tolist():
        rows = [int(plan.query_index[one]) // plan.text.shape[1] for one in positions if one != MISSING]
        texts = [tuple(plan.text[row, : plan.lengths[row]].tolist()) for row in rows]
        found.append(list(zip([int(plan.image_of_row[row]) for row in rows], texts, strict=True)))
    return found


def test_candidates_are_the_texts_of_each_image_in_their_order() -> None:
    texts = [caption(words, words) for words in (3, 5, 2, 7, 4)]
    owner = [0, 0, 0, 2, 2]
    rows = [Row(ids, image, 0, "read") for ids, image in zip(texts, owner, strict=True)]
    rows.insert(3, Row([0, 2], 1, 0, "placeholder"))
    batch = CandidatePlanner(PLANNER)(images(3), rows)
    expected = [
        [(0, tuple(texts[0])), (0, tuple(texts[1])), (0, tuple(texts[2]))],
        [(2, tuple(ids)) for ids in texts[3:]],
    ]
    assert looked_up(batch, "i2t") == expected
    assert batch.counts == {"i2t": 2}
    assert batch.terms["i2t"].position[1, 2] == MISSING


def test_a_batch_of_placeholders_has_no_ranking() -> None:
    placeholder = Row([0, 2], 0, 0, "placeholder")
    for planner in (CandidatePlanner(PLANNER), InBatchPlanner(PLANNER, 2)):
        assert not any(planner(images(1), [placeholder]).counts.values())


def test_in_batch_both_ways_with_the_most_alike() -> None:
    texts = [[0, *words, 2] for words in ([5, 6, 7], [5, 6, 9], [20, 21], [5, 30, 31], [20, 22, 23], [5, 6, 7])]
    keys = ["a", "b", "c", "b", "e", "f"]  # 1 and 3 are of one sample, 0 and 5 say the same
    rows = [Row(ids, number, number, "read", key) for number, (ids, key) in enumerate(zip(texts, keys, strict=True))]
    batch = InBatchPlanner(PLANNER, 2)(images(6), rows)
    likeness = resemblance([ids[1:-1] for ids in texts], list(range(6)))
    for number, (shown, ranked) in enumerate(zip(looked_up(batch, "t2i"), looked_up(batch, "i2t"), strict=True)):
        others = [image for image, _ in shown[1:]]
        assert shown[0] == ranked[0] == (number, tuple(texts[number]))
        assert [words for _, words in shown] == [tuple(texts[number])] * 3
        assert ranked[1:] == [(number, tuple(texts[other])) for other in others]
        allowed = [o for o in range(6) if o != number and texts[o] != texts[number] and keys[o] != keys[number]]
        assert set(others) <= set(allowed)
        left_out = set(allowed) - set(others)
        assert min(likeness[number, others]) >= max((likeness[number, one] for one in left_out), default=-1)


def test_each_pair_runs_once_and_few_pairs_give_short_rankings() -> None:
    rows = [Row(caption(3 + number, number), number, number, "read", str(number)) for number in range(4)]
    batch = InBatchPlanner(PLANNER, 15)(images(4), rows)
    assert batch.plan.text.shape[0] == 16 and batch.plan.num_paired == 4
    every = sorted(pair for ranking in looked_up(batch, "i2t") for pair in ranking)
    assert every == sorted((image, tuple(row.token_ids)) for image, row in itertools.product(range(4), rows))
