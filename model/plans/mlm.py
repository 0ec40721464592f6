"""Plans of masked language modelling: which tokens are hidden, which of them are predicted (specification section 4).

Legend: n a row's length, k = n-2 its words.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from model.batch import Batch, Kind, Row
from model.config import Vocabulary
from model.plans.builder import PlanBuilder, matched_rows, padded_length, row_generator

MASKED_SHARE, RANDOM_SHARE = 0.8, 0.1  # of the chosen tokens; the rest stays as it is (BERT, arXiv 1810.04805)


@dataclass(frozen=True)
class MLMPlanner:
    """Masked language modelling with an exact rate on the words of each caption.

    ``mask_rate`` of the words are hidden (rounded up or down at random so that the mean is exact; at least one), of
    these 80 % by `<mask>`, 10 % by a random word, 10 % not at all. ``prediction_rate`` of the words are predicted
    (null: all that are hidden). Where it is lower, a random part of the hidden words has a loss; where it is higher,
    the caption is masked several times, as further rows on the same image, until enough words had their turn once.
    ``whole_words`` hides all tokens of a word together, or none. ``itm`` reads the state of `<s>`. In read rows nothing
    is hidden.
    """

    vocabulary: Vocabulary
    mask_rate: float
    prediction_rate: float | None
    whole_words: bool
    negative_share: float
    full_stop: bool = False

    def __call__(self, images: Tensor, rows: list[Row]) -> Batch:
        """images uint8 [B, I, 3, H, W]; any row may read any image."""
        builder = PlanBuilder(padded_length(rows), self._terms())
        matched = matched_rows(rows)
        planned: list[Row] = []
        again: list[tuple[Row, np.ndarray, np.ndarray]] = []
        for number, row in enumerate(rows):
            masked, *more = self._maskings(row)
            again += more
            states = self._add(builder, planned, masked)
            if row.role == "read":
                builder.add_feature("l2r", number, states[:1])
            if number in matched:
                builder.add_targets("itm", states[:1], [matched[number]])
        for masked in again:
            self._add(builder, planned, masked)
        return builder.build(images, planned, self.vocabulary, prefix=[len(row.token_ids) for row in planned])

    def _terms(self) -> dict[str, tuple[str, Kind]]:
        return {"mlm": ("l2r", "token"), "itm": ("l2r", "class")}

    def _add(self, builder: PlanBuilder, planned: list[Row], masked: tuple[Row, np.ndarray, np.ndarray]) -> np.ndarray:
        """Adds a masked row with all its states and its targets; returns the packed positions of the states."""
        row, targets, labels = masked
        if row.role == "placeholder":
            planned.append(row)
            return np.zeros(0, dtype=np.int64)
        states = builder.add_states("l2r", len(planned), np.arange(len(row.token_ids)))
        planned.append(row)
        builder.add_targets("mlm", states[targets], labels)
        return states

    def _maskings(self, row: Row) -> list[tuple[Row, np.ndarray, np.ndarray]]:
        """(row with hidden words, positions of its targets, their labels), once or more often."""
        nothing = np.zeros(0, dtype=np.int64)
        num_words = len(row.token_ids) - 2
        if row.role in ("placeholder", "read") or num_words < 1:
            return [(row, nothing, nothing)]
        generator = row_generator(row.seed)
        groups = self._word_groups(row.token_ids)
        hidden_count = rounded(self.mask_rate * num_words, generator)
        if row.role == "negative" or self.prediction_rate is None:
            positions = hide(groups, hidden_count, generator)
            targets = positions if row.role == "pair" else nothing
            return [(self._corrupted(row, positions, generator), targets, np.array(row.token_ids)[targets])]
        wanted = rounded(self.prediction_rate * num_words, generator)
        results = []
        waiting = np.ones(len(row.token_ids), dtype=bool)  # not predicted yet
        while wanted > 0:
            positions = hide(groups, hidden_count, generator, waiting)
            targets = positions[waiting[positions]]
            targets = np.sort(generator.permutation(targets)[:wanted])
            waiting[targets] = False
            wanted -= len(targets)
            labels = np.array(row.token_ids)[targets]
            results.append((self._corrupted(row, positions, generator), targets, labels))
        return results

    def _word_groups(self, ids: list[int]) -> list[np.ndarray]:
        """Positions of the tokens that are hidden together."""
        positions = np.arange(1, len(ids) - 1)
        if not self.whole_words:
            return list(positions[:, None])
        starts = np.array([position == 1 or self.vocabulary.starts_word(ids[position]) for position in positions])
        return np.split(positions, np.flatnonzero(starts)[1:])

    def _corrupted(self, row: Row, positions: np.ndarray, generator: np.random.Generator) -> Row:
        ids = np.array(row.token_ids)
        draws = generator.random(len(positions))
        words = generator.integers(0, self.vocabulary.size, len(positions))
        words = np.where(np.isin(words, self.vocabulary.special_ids), ids[positions], words)
        replaced = np.where(draws < MASKED_SHARE + RANDOM_SHARE, words, ids[positions])
        ids[positions] = np.where(draws < MASKED_SHARE, self.vocabulary.mask_id, replaced)
        return dataclasses.replace(row, token_ids=ids.tolist())


@dataclass(frozen=True)
class ReleasedMLMPlanner(MLMPlanner):
    """As the release draws its masks: round(L * rate) of all L padded positions, of which only words count.

    # NOTE release: its whole-word switch cannot work for byte-level BPE, so every token is a word of its own; a caption
    without a masked word has no target (34 % of those of 6 tokens at rate 0.15).
    """

    max_text_length: int = 50

    def __call__(self, images: Tensor, rows: list[Row]) -> Batch:
        """As :class:`MLMPlanner`, without image-text matching."""
        return super().__call__(images, [row for row in rows if row.role != "negative"])

    def _terms(self) -> dict[str, tuple[str, Kind]]:
        return {"mlm": ("l2r", "token")}

    def _maskings(self, row: Row) -> list[tuple[Row, np.ndarray, np.ndarray]]:
        if row.role == "read":
            return super()._maskings(row)
        generator = row_generator(row.seed)
        chosen = generator.permutation(self.max_text_length)[: max(1, round(self.max_text_length * self.mask_rate))]
        positions = np.sort(chosen[(chosen >= 1) & (chosen < len(row.token_ids) - 1)])
        return [(self._corrupted(row, positions, generator), positions, np.array(row.token_ids)[positions])]


def rounded(value: float, generator: np.random.Generator) -> int:
    """``value`` rounded up or down at random so that the mean is exact, at least 1."""
    return max(1, int(value + generator.random()))


def hide(
    groups: list[np.ndarray], count: int, generator: np.random.Generator, waiting: np.ndarray | None = None
) -> np.ndarray:
    """Positions of ``count`` tokens, whole groups in random order (those with a waiting token first), sorted.

    The last group is left out where that comes nearer to ``count``; the first is always in.
    """
    order = generator.permutation(len(groups))
    if waiting is not None:
        order = sorted(order, key=lambda number: not waiting[groups[number]].any())
    chosen: list[np.ndarray] = []
    size = 0
    for number in order:
        group = groups[number]
        if size >= count or (size and size + len(group) - count > count - size):
            break
        chosen.append(group)
        size += len(group)
    return np.sort(np.concatenate(chosen))
