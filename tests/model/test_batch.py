"""The contract of a batch: what any task fills, and nothing that only text planning needs."""

from __future__ import annotations

import torch

from model.batch import Batch, Row, Term
from model.plans.builder import PlanBuilder
from tests.tiny_flm import VOCABULARY, caption


def test_a_task_without_text_fills_images_and_terms_only() -> None:
    """Two images a sample, soft targets and classes: it moves, it is counted, no field is left empty for others."""
    soft = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    terms = {
        "brighter": Term("pooled", torch.arange(2), soft, "soft"),
        "kind": Term("pooled", torch.tensor([1]), torch.tensor([3]), "class"),
        "seen": Term("pooled", torch.arange(2), torch.arange(2), "feature"),
    }
    batch = Batch(torch.zeros((2, 2, 3, 8, 8), dtype=torch.uint8), terms, keys=["a", "b"])
    assert batch.counts == {"brighter": 2, "kind": 1} and batch.plan is None
    moved = batch.to("meta")
    assert moved.images.device.type == moved.terms["brighter"].target.device.type == "meta"
    assert moved.terms["brighter"].kind == "soft" and moved.keys == ["a", "b"] and moved.plan is None


def test_rows_of_samples_with_two_images() -> None:
    """Row r reads image r of the B*I images of the batch, so keys and values need no copy; else nothing is paired."""
    images, rows = torch.zeros((2, 2, 3, 8, 8), dtype=torch.uint8), [Row(caption(3, n), n, n) for n in range(4)]
    batch = PlanBuilder(8, {}).build(images, rows, VOCABULARY)
    assert batch.plan.image_of_row.tolist() == [0, 1, 2, 3] and batch.plan.num_paired == 4
    assert PlanBuilder(8, {}).build(images, rows[::-1], VOCABULARY).plan.num_paired == 0
