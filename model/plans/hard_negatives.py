"""Hard negatives for image-text matching: the caption of the micro-batch that resembles a sample's own most.

Chosen on the host from token ids, with no read of data and nothing that waits for the device. Legend: P pairs of the
micro-batch, C of them contrasted, U distinct tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from model.batch import Batch, Planner, Row
from model.plans.builder import row_generator

DRAWS = 1  # stream of a row's random numbers, apart from those for spans and masks
DIGITS = 6  # resemblances that differ by less are equal, whatever order a machine sums in


@dataclass(frozen=True)
class HardNegatives:
    """A planner that adds a negative row for ``share`` of the pairs, then plans as ``planner`` does.

    Which samples get one follows from their seeds; which caption it is depends on the micro-batch.
    """

    planner: Planner
    share: float
    negative_share: float = 0.0  # none are read from the corpus

    @property
    def full_stop(self) -> bool:
        return self.planner.full_stop

    def __call__(self, images: Tensor, rows: list[Row]) -> Batch:
        """As the planner inside; a pair whose image has a negative row already gets no other."""
        return self.planner(images, [*rows, *hard_negatives(rows, self.share)])


def hard_negatives(rows: list[Row], share: float) -> list[Row]:
    """Negative rows for about ``share`` of the pairs among ``rows``, in their order.

    Each carries the caption that resembles the pair's own most (:func:`resemblance`); among equals a draw from the
    pair's seed decides. Captions equal to the own one, captions of the same sample (``Row.sample``) and captions
    without words do not count; where no other is left the pair has no negative.
    """
    pairs = [row for row in rows if row.role == "pair"]
    has_one = {row.image for row in rows if row.role == "negative"}
    draws = [_draws(row) for row in pairs]
    wanted = [number for number, row in enumerate(pairs) if draws[number][0] < share and row.image not in has_one]
    if not wanted:
        return []
    likeness = resemblance([row.token_ids[1:-1] for row in pairs], wanted)
    likeness[_not_allowed(pairs, wanted)] = -1
    negatives = []
    for values, number in zip(likeness, wanted, strict=True):
        row, (_, choice, seed) = pairs[number], draws[number]
        best = np.flatnonzero(values == values.max())
        if values[best[0]] >= 0:
            caption = pairs[best[int(choice * len(best))]].token_ids
            negatives.append(Row(caption, row.image, seed, "negative"))
    return negatives


def most_alike(pairs: list[Row], count: int) -> list[list[int]]:
    """For each pair the numbers of up to ``count`` others whose captions resemble its own most, the most alike first.

    Among equals a draw from the seed of the pair decides. Who does not count: see :func:`hard_negatives`.
    """
    if not pairs:
        return []
    every = list(range(len(pairs)))
    likeness = resemblance([row.token_ids[1:-1] for row in pairs], every)
    likeness[_not_allowed(pairs, every)] = -1
    found = []
    for values, row in zip(likeness, pairs, strict=True):
        order = np.lexsort((row_generator(row.seed, DRAWS).permutation(len(pairs)), -values))
        found.append([int(number) for number in order[:count] if values[number] >= 0])
    return found


def resemblance(captions: list[list[int]], wanted: list[int]) -> np.ndarray:
    """How much the captions ``wanted`` resemble each of all: weighted Jaccard index of their sets of tokens, 0 to 1.

    A token weighs log((1 + P) / number of the P captions that hold it): what every caption says counts least.

    Returns:
        fp64 [C, P], rounded.
    """
    tokens, column = np.unique(np.concatenate([*captions, []]).astype(np.int64), return_inverse=True)
    held = np.zeros((len(captions), len(tokens)))
    held[np.repeat(np.arange(len(captions)), [len(ids) for ids in captions]), column] = 1
    weights = np.log((1 + len(captions)) / held.sum(0))
    shared = (held[wanted] * weights) @ held.T
    total = held @ weights
    either = total[wanted][:, None] + total - shared
    return np.divide(shared, either, out=np.zeros_like(shared), where=either > 0).round(DIGITS)


def apart(pairs: list[Row]) -> np.ndarray:
    """bool [P, P]: of two samples, with captions that have words and are not the same."""
    wordless = np.array([len(row.token_ids) <= 2 for row in pairs])
    return ~_not_allowed(pairs, list(range(len(pairs)))) & ~wordless[:, None]


def _draws(row: Row) -> tuple[float, float, int]:
    """Whether the row has a negative and which of equal ones (both in [0, 1)), and the seed of that negative."""
    generator = row_generator(row.seed, DRAWS)
    return generator.random(), generator.random(), int(generator.integers(0, 2**63))


def _not_allowed(pairs: list[Row], wanted: list[int]) -> np.ndarray:
    """bool [C, P]: captions that say the same, belong to the same sample, or have no words."""
    numbers: dict[object, int] = {}
    caption = np.array([numbers.setdefault(tuple(row.token_ids), len(numbers)) for row in pairs])
    named = [row.sample or number for number, row in enumerate(pairs)]
    sample = np.array([numbers.setdefault(("sample", name), len(numbers)) for name in named])
    wordless = np.array([len(row.token_ids) <= 2 for row in pairs])
    equal = (caption[wanted][:, None] == caption) | (sample[wanted][:, None] == sample)
    return equal | wordless
