"""How samples become a batch: their rows in one list, placeholders for the unusable, then the planner of the task."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from model.batch import Batch, Planner, Row


class Item(NamedTuple):
    """One sample without its pixels, which stand in the batch's image tensor already.

    The images of its ``rows`` count from 0. An unusable sample has its reason in ``problem``, placeholders as rows, and
    black images.
    """

    key: str
    rows: Sequence[Row]
    problem: str | None = None


def collate(items: Sequence[Item], images: Tensor, planner: Planner, positions: Sequence[int] = ()) -> Batch:
    """B items and their images, uint8 [B, I, 3, S, S], to a batch: rows sample by sample, then all negatives.

    An unusable item keeps its slot; its name stands in ``Batch.problems``.
    """
    per_sample = images.shape[1]
    rows = [
        dataclasses.replace(row, image=number * per_sample + row.image)
        for number, item in enumerate(items)
        for row in item.rows
    ]
    batch = planner(images, sorted(rows, key=lambda row: row.role == "negative"))
    batch.keys, batch.positions = [item.key for item in items], list(positions)
    batch.notes = [item.rows[0].note for item in items]
    batch.problems = [(item.key, item.problem) for item in items if item.problem is not None]
    return batch
