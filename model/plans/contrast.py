"""Plans of the contrastive term: which texts and images of a micro-batch are wrong pairs.

Legend: B samples, I images per sample, P pairs, C of them that are contrasted.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.batch import Batch, Planner, Row, Term
from model.plans.hard_negatives import apart


@dataclass(frozen=True)
class ContrastPlanner:
    """Plans as ``planner`` does, whose batches have row n of the plan where row n stood, and adds the term ``itc``.

    Its targets are the pairs that have a wrong one in the micro-batch: see :func:`contrasted_pairs`.
    """

    planner: Planner

    @property
    def negative_share(self) -> float:
        return self.planner.negative_share

    @property
    def full_stop(self) -> bool:
        return self.planner.full_stop

    def __call__(self, images: Tensor, rows: list[Row]) -> Batch:
        """As the planner inside."""
        batch = self.planner(images, rows)
        found = contrasted_pairs(rows, images.shape[0] * images.shape[1])
        position, wrong = map(torch.from_numpy, found)
        return dataclasses.replace(batch, terms=batch.terms | {"itc": Term("bottom", position, wrong, "contrast")})


def contrasted_pairs(rows: list[Row], num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the rows that are contrasted, int64 [C], and which images are wrong for their texts, bool [C, B*I].

    Rows with the role "pair" alone take part. An image is wrong for a text if it is not the text's own and all its
    texts belong to other samples and say something else: several texts of an image, and equal texts of two images, are
    never wrong. A pair without a wrong image for its text, or a wrong text for its image, has no target.
    """
    numbers = np.array([number for number, row in enumerate(rows) if row.role == "pair"], np.int64)
    pairs = [rows[number] for number in numbers]
    image = np.array([row.image for row in pairs], np.int64)
    wrong = np.zeros((len(pairs), num_images), bool)
    if len(pairs):
        differ = apart(pairs)
        for one in np.unique(image):
            wrong[:, one] = differ[:, image == one].all(1) & (image != one)
    kept = wrong.any(1) | wrong.any(0)[image]
    return numbers[kept], wrong[kept]
