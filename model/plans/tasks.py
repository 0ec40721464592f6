"""Plans of fine-tuning: which targets a task predicts from rows that are read.

Legend: B samples, I images of a sample, M targets, C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from model.batch import Batch, Planner, Row, Term

ClassKind = Literal["class", "soft"]


@dataclass(frozen=True)
class ClassPlanner:
    """Plans as ``planner`` does, then makes one target of each text and the images of its sample.

    A text stands in I consecutive rows of the role "read", one per image of the sample, in their order; ``Row.target``
    of its first row is the target: a class ("class"), a list of (class, score) with 0 for all others ("soft"), or None
    for a text whose target nobody knows. The batch has two terms: ``term`` with the targets that are known, and "read"
    (kind "feature") of all texts, its ``target`` int64 [M] the number of each text's first row. ``position`` of both is
    int64 [M, I], in the order of the rows.
    """

    planner: Planner
    term: str
    num_classes: int
    num_images: int = 1
    kind: ClassKind = "class"

    def __call__(self, images: Tensor, rows: list[Row]) -> Batch:
        """images uint8 [B, I, 3, H, W].

        Raises:
            ValueError: the rows of a text are not one per image of its sample, or a target is no class.
        """
        batch = self.planner(images, rows)
        nothing = torch.zeros(0, dtype=torch.int64)
        any_source = next(iter(batch.terms.values())).source  # from which nothing will be selected
        source, position, number, _ = batch.terms.get("read", Term(any_source, nothing, nothing))
        self._refuse_other_images([rows[each].image for each in number.tolist()])
        position, number = position.view(-1, self.num_images), number[:: self.num_images]
        targets = [rows[each].target for each in number.tolist()]
        known = torch.tensor([target is not None for target in targets], dtype=torch.bool)
        dense = self._dense([target for target in targets if target is not None])
        terms = {
            self.term: Term(source, position[known], dense, self.kind),
            "read": Term(source, position, number, "feature"),
        }
        return dataclasses.replace(batch, terms=terms)

    def _refuse_other_images(self, images: list[int]) -> None:
        for start in range(0, len(images), self.num_images):
            found = images[start : start + self.num_images]
            first = found[0] - found[0] % self.num_images
            if found != list(range(first, first + self.num_images)):
                raise ValueError(
                    f"the rows of a text read images {found}, expected the {self.num_images} of one sample in order"
                )

    def _dense(self, targets: Sequence[Any]) -> Tensor:
        """int64 [M] or fp32 [M, C]."""
        scored = [target if self.kind == "soft" else [(target, 1.0)] for target in targets]
        for number, score in (pair for target in scored for pair in target):
            if not 0 <= number < self.num_classes or not 0 <= score <= 1:
                raise ValueError(
                    f"a target of {self.term} is class {number} with score {score}, expected classes 0 to"
                    f" {self.num_classes - 1} and scores 0 to 1"
                )
        if self.kind == "class":
            return torch.tensor(targets, dtype=torch.int64)
        dense = torch.zeros(len(targets), self.num_classes)
        for row, target in zip(dense, scored, strict=True):
            for number, score in target:
                row[number] = score
        return dense
