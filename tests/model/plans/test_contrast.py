"""Which texts and images of a micro-batch are wrong pairs, against the definition row by row."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.batch import Row
from model.plans.contrast import ContrastPlanner, contrasted_pairs
from tests.tiny_flm import caption, images, pair_rows, tiny_flm

ROWS = st.lists(
    st.tuples(
        st.lists(st.integers(3, 5), max_size=2),
        st.integers(0, 3),
        st.sampled_from(["", "x", "y"]),
        st.sampled_from(["pair", "pair", "pair", "negative", "placeholder", "read"]),
    ),
    min_size=1,
    max_size=8,
)


def are_wrong(rows: list[Row], text: Row, image: int) -> bool:
    """Whether the image is a wrong one for the text: others' texts alone are about it, and all say something else."""
    about = [row for row in rows if row.role == "pair" and row.image == image]
    return bool(about) and all(
        row.image != text.image
        and not (row.sample and row.sample == text.sample)
        and row.token_ids != text.token_ids
        and min(len(row.token_ids), len(text.token_ids)) > 2
        for row in about
    )


@settings(max_examples=100, deadline=None)
@given(ROWS)
def test_wrong_pairs_are_of_other_samples_and_say_something_else(drawn: list) -> None:
    rows = [Row([0, *words, 2], image, 0, role, sample) for words, image, sample, role in drawn]
    position, wrong = contrasted_pairs(rows, 4)
    pairs = [number for number, row in enumerate(rows) if row.role == "pair"]
    table = {number: [are_wrong(rows, rows[number], image) for image in range(4)] for number in pairs}
    kept = [n for n in pairs if any(table[n]) or any(table[other][rows[n].image] for other in pairs)]
    assert position.tolist() == kept
    assert wrong.tolist() == [table[number] for number in kept] and wrong.shape[1] == 4


def test_the_term_stands_beside_those_of_the_planner_inside() -> None:
    """With negatives of the micro-batch and further maskings, which add rows of their own."""
    rows = pair_rows([caption(4, 1), caption(6, 2)])
    hard = {"negatives": "in_batch_hard", "negative_share": 1.0}
    for options in (hard, {"name": "mlm", "mask_rate": 0.2, "prediction_rate": 1.0}):
        planner = tiny_flm(itc_weight=1.0, **options).planner
        batch, plain = planner(images(2), rows), planner.planner(images(2), rows)
        assert isinstance(planner, ContrastPlanner) and len(batch.plan.text) > 2
        assert batch.counts == plain.counts | {"itc": 2}
        assert torch.equal(batch.plan.text, plain.plan.text)
        assert batch.plan.image_of_row[batch.terms["itc"].position].tolist() == [0, 1]
        assert (planner.negative_share, planner.full_stop) == (planner.planner.negative_share, False)
