"""Plans of a Q-Former's first stage: texts to be written, and which texts and images of a micro-batch are wrong pairs.

Legend: P texts, T longest one, C of them that have wrong pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.batch import Batch, PairPlan, Row, Term
from model.config import Vocabulary
from model.plans.builder import padded_length, row_generator
from model.plans.hard_negatives import apart

DRAWS = 2  # stream of a row's random numbers


@dataclass(frozen=True)
class ImageTextPlanner:
    """Every pair is contrasted with those of its micro-batch that are of other samples and say something else.

    Terms: ``itc`` [C], the text of an image and the image of a text among all; ``itm`` [3C], right pairs (1), each
    image with a wrong text, each text with a wrong image (0); ``itg``, each token of a text but the first. A pair that
    none is apart from has no target of the first two.
    """

    vocabulary: Vocabulary
    negative_share: float = 0.0  # none are read from the corpus
    full_stop: bool = False

    def __call__(self, images: Tensor, rows: list[Row]) -> Batch:
        """images uint8 [B, 1, 3, H, W]; rows with the role "pair" have targets.

        Raises:
            ValueError: a row reads an image that is not there.
        """
        read = [row.image for row in rows]
        if not 0 <= min(read) <= max(read) < len(images):
            raise ValueError(f"rows read images {min(read)} to {max(read)}, expected 0 to {len(images) - 1}")
        length = padded_length(rows)
        text = np.full((len(rows), length), self.vocabulary.pad_id)
        words, draws = [], np.empty((2, len(rows), len(rows)), np.float32)
        for number, row in enumerate(rows):
            text[number, : len(row.token_ids)] = row.token_ids
            draws[:, number] = row_generator(row.seed, DRAWS).uniform(1e-6, 1 - 1e-6, (2, len(rows)))
            if row.role == "pair":
                words.append(number * length + np.arange(1, len(row.token_ids)))
        wrong = _wrong_pairs(rows)
        plan = PairPlan(
            text=torch.from_numpy(text),
            lengths=torch.tensor([len(row.token_ids) for row in rows]),
            image=torch.tensor(read),
            apart=torch.from_numpy(wrong),
            draws=torch.from_numpy(draws),
        )
        contrasted = torch.from_numpy(np.flatnonzero(wrong.any(1)))
        targets = torch.from_numpy(np.concatenate([*words, []]).astype(np.int64))
        matches = torch.arange(3 * len(contrasted))
        terms = {
            "itc": Term("pairs", contrasted, contrasted.clone(), "class"),
            "itm": Term("matches", matches, (matches < len(contrasted)).long(), "class"),
            "itg": Term("words", targets - 1, plan.text.flatten()[targets]),
        }
        return Batch(images, terms, plan=plan)


def _wrong_pairs(rows: list[Row]) -> np.ndarray:
    """bool [P, P], True where the text of one row is no text of the other's image; symmetric."""
    wrong = np.zeros((len(rows), len(rows)), bool)
    pairs = [number for number, row in enumerate(rows) if row.role == "pair"]
    if pairs:
        images = np.array([rows[number].image for number in pairs])
        wrong[np.ix_(pairs, pairs)] = apart([rows[number] for number in pairs]) & (images[:, None] != images)
    return wrong
