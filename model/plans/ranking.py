"""Plans of retrieval: which texts an image, and which images a text, is ranked among.

Legend: M rankings, C candidates of each, the right one first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.batch import Batch, Planner, Row, Term
from model.plans.hard_negatives import most_alike

MISSING = -1  # position of a candidate where a ranking has fewer than others


@dataclass(frozen=True)
class CandidatePlanner:
    """Plans as ``planner`` does, then ranks the texts of each image: all rows of the role "read" that read it.

    The first of them is the right one. Term "i2t": ``position`` int64 [M, C], ``MISSING`` where an image has fewer
    texts; ``target`` int64 [M], all 0.
    """

    planner: Planner

    def __call__(self, images: Tensor, rows: list[Row]) -> Batch:
        """images uint8 [B, 1, 3, H, W]; rows of an image may stand anywhere."""
        batch = self.planner(images, rows)
        source, where = _read_positions(batch)
        of_image: dict[int, list[int]] = {}
        for number, position in where.items():
            of_image.setdefault(rows[number].image, []).append(position)
        return dataclasses.replace(batch, terms={"i2t": _ranking(source, list(of_image.values()))})


@dataclass(frozen=True)
class InBatchPlanner:
    """Ranks each text of the micro-batch, one an image, among the images of others, and each image among their texts.

    The others are the ``num_negatives`` pairs whose texts resemble the own most (:func:`most_alike`); fewer where the
    micro-batch has no more. Terms "i2t" and "t2i" as of :class:`CandidatePlanner`. Which the negatives are depends on
    the micro-batch.
    """

    planner: Planner
    num_negatives: int

    def __call__(self, images: Tensor, rows: list[Row]) -> Batch:
        """images uint8 [B, 1, 3, H, W], one row an image."""
        pairs = [row for row in rows if row.role == "read"]
        others = most_alike(pairs, self.num_negatives)
        numbers = {(number, number): number for number in range(len(pairs))}  # of the row of (image, text)
        for number, alike in enumerate(others):
            for other in alike:
                numbers.setdefault((number, other), len(numbers))
                numbers.setdefault((other, number), len(numbers))
        crossed = [dataclasses.replace(pairs[text], image=pairs[image].image) for image, text in numbers]
        batch = self.planner(images, [*crossed, *(row for row in rows if row.role != "read")])
        source, where = _read_positions(batch)
        texts = [[where[numbers[number, other]] for other in [number, *alike]] for number, alike in enumerate(others)]
        shown = [[where[numbers[other, number]] for other in [number, *alike]] for number, alike in enumerate(others)]
        return dataclasses.replace(batch, terms={"i2t": _ranking(source, texts), "t2i": _ranking(source, shown)})


def _read_positions(batch: Batch) -> tuple[str, dict[int, int]]:
    """The output of the network that holds CLS features; number of each read row -> position of its feature there."""
    if "read" not in batch.terms:
        return next(iter(batch.terms.values())).source, {}
    term = batch.terms["read"]
    return term.source, dict(zip(term.target.tolist(), term.position.tolist(), strict=True))


def _ranking(source: str, candidates: Sequence[Sequence[int]]) -> Term:
    longest = max(map(len, candidates), default=1)
    position = torch.full((len(candidates), longest), MISSING)
    for row, found in zip(position, candidates, strict=True):
        row[: len(found)] = torch.tensor(found)
    return Term(source, position, torch.zeros(len(candidates), dtype=torch.int64), "class")
