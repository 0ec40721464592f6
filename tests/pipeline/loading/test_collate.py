"""Rows, seeds, placeholders and cleaned captions of a batch."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field, fields

import pytest
import torch
from torch import Tensor

from model.batch import Batch, Row, Term, TextPlan
from model.config import Vocabulary
from model.plans.flm import FLMPlanner
from pipeline.data.tokenizer import clean_caption
from pipeline.loading.collate import Item, collate


@dataclass
class RecordingPlanner:
    """A planner that keeps its rows and makes the plainest batch: every word is an l2r target."""

    rows: list[Row] = field(default_factory=list)

    def __call__(self, images: Tensor, rows: list[Row]) -> Batch:
        self.rows = rows
        longest = max(len(row.token_ids) for row in rows)
        text = torch.tensor([row.token_ids + [1] * (longest - len(row.token_ids)) for row in rows])
        nothing = torch.zeros(0, dtype=torch.int64)
        labels = torch.tensor([number for row in rows if row.role == "pair" for number in row.token_ids[1:-1]])
        plan = TextPlan(
            text=text,
            lengths=torch.tensor([len(row.token_ids) for row in rows]),
            image_of_row=torch.tensor([row.image for row in rows]),
            **{f.name: nothing for f in fields(TextPlan) if f.name.endswith("_index")},
            query_span=nothing.view(0, 2),
            prefix=torch.zeros(len(rows), dtype=torch.int64),
        )
        return Batch(images, {"l2r": Term("l2r", torch.arange(len(labels)), labels)}, plan=plan)


def item(key: str, seed: int, ids: list[int], negative: list[int] | None = None, problem: str | None = None) -> Item:
    rows = [Row(ids, 0, seed, "placeholder" if problem else "pair", key)]
    return Item(key, rows + ([Row(negative, 0, -seed, "negative")] if negative else []), problem)


ITEMS = [
    item("a", 11, [0, 5, 6, 2]),
    item("b", 12, [0, 7, 2], [0, 8, 9, 10, 2]),
    item("c", 13, [0, 2], None, "truncated image"),
    item("d", 14, [0, 5, 2], [0, 6, 2]),
]
IMAGES = torch.zeros((4, 1, 3, 4, 4), dtype=torch.uint8)


def test_own_captions_first_then_negatives():
    planner = RecordingPlanner()
    batch = collate(ITEMS, IMAGES, planner)
    assert [(row.image, row.role) for row in planner.rows] == [
        (0, "pair"),
        (1, "pair"),
        (2, "placeholder"),
        (3, "pair"),
        (1, "negative"),
        (3, "negative"),
    ]
    assert [row.seed for row in planner.rows[:4]] == [11, 12, 13, 14]
    assert len({row.seed for row in planner.rows}) == 6
    assert batch.keys == ["a", "b", "c", "d"] and batch.plan.text.shape == (6, 5)
    assert batch.images.is_set_to(IMAGES)


def test_two_images_a_sample():
    """Rows of a sample count its images from 0, those of a batch over all of them."""
    planner, pair = RecordingPlanner(), [Row([0, 5, 2], 0, 1), Row([0, 6, 2], 1, 2), Row([0, 7, 2], 1, 3, "negative")]
    collate([Item("a", pair), Item("b", pair[:2])], torch.zeros((2, 2, 3, 4, 4), dtype=torch.uint8), planner)
    assert [(row.image, row.token_ids[1]) for row in planner.rows] == [(0, 5), (1, 6), (2, 5), (3, 6), (1, 7)]


def test_unusable_sample_keeps_its_slot():
    """Invariant 8."""
    batch = collate(ITEMS, IMAGES, RecordingPlanner())
    assert batch.problems == [("c", "truncated image")]
    assert batch.plan.lengths[2] == 2 and batch.counts == {"l2r": 4}


def test_a_batch_of_nothing_but_problems_has_its_shape():
    """Invariant 8, with the real planner: no targets, same shapes."""
    items = [item("x", 1, [0, 2], None, "empty image"), item("y", 2, [0, 2], None, "missing image")]
    planner = FLMPlanner(Vocabulary(size=20, bos_id=0, pad_id=1, eos_id=2, mask_id=19), 0.0, 0.5)
    batch = collate(items, IMAGES[:2], planner)
    assert batch.images.shape == (2, 1, 3, 4, 4) and set(batch.counts.values()) == {0}
    assert [reason for _, reason in batch.problems] == ["empty image", "missing image"]


def test_rows_do_not_depend_on_neighbours():
    """Invariant 5: seeds and tokens of a row are the same alone and in company."""
    together, alone = RecordingPlanner(), RecordingPlanner()
    collate(ITEMS, IMAGES, together)
    for number, one in enumerate(ITEMS):
        collate([one], IMAGES[:1], alone)
        mine = [row for row in together.rows if row.image == number]
        assert [(r.token_ids, r.seed, r.role) for r in alone.rows] == [(r.token_ids, r.seed, r.role) for r in mine]


def test_planner_pickles():
    """The loader's workers get it by pickling where processes are spawned."""
    assert pickle.loads(pickle.dumps(RecordingPlanner())) == RecordingPlanner()


@pytest.mark.parametrize(
    "text, plain, stopped",
    [
        ("A dog .", "A dog .", "A dog."),
        ("  two\tdogs\n\u3000run\u00a0fast ", "two dogs run fast", "two dogs run fast."),
        ("a dog...", "a dog...", "a dog."),
        ("a dog", "a dog", "a dog."),
        ("3.5 litres.", "3.5 litres.", "3.5 litres."),
        (" . . ", ". .", ""),
        (" \u2003\n", "", ""),
    ],
)
def test_clean_caption(text, plain, stopped):
    assert (clean_caption(text, full_stop=False), clean_caption(text, full_stop=True)) == (plain, stopped)
