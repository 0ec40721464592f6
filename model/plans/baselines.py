"""Planning for the one-stream baselines: which tokens are masked, which are predicted (specification section 4).

Pure functions of the rows, like model/plans/flm.py. Legend: n a row's length, k = n-2 its words.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from model.batch import Batch, Row
from model.config import Vocabulary
from model.plans.flm import Lists, assemble, padded_length, refuse_read_rows, row_generator

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
        """images uint8 [B, I, 3, H, W]; rows 0..B-1 read images 0..B-1, further rows are negatives.

        Where a row has the role "read", all rows may read any image.
        """
        num_positions = padded_length(max(len(row.token_ids) for row in rows))
        contrasted = {row.image for row in rows if row.role == "negative"}
        lists = Lists(("mlm", "itm"))
        planned: list[Row] = []
        again: list[tuple[Row, np.ndarray, np.ndarray]] = []
        for number, row in enumerate(rows):
            masked, *more = self._maskings(row)
            again += more
            states = self._add(lists, planned, masked, num_positions)
            if row.role == "read":
                lists.read(number, states[:1])
            if row.role == "negative" or (row.role == "pair" and row.image in contrasted):
                lists.predict("itm", states[:1], np.array([int(row.role == "pair")]))
        for masked in again:
            self._add(lists, planned, masked, num_positions)
        prefix = [len(row.token_ids) for row in planned]
        return assemble(images, planned, num_positions, self.vocabulary, lists, prefix)

    def _add(
        self, lists: Lists, planned: list[Row], masked: tuple[Row, np.ndarray, np.ndarray], num_positions: int
    ) -> np.ndarray:
        """Has all states of a masked row computed and its targets predicted; returns the positions of the states."""
        row, targets, labels = masked
        if row.role == "placeholder":
            planned.append(row)
            return np.zeros(0, dtype=np.int64)
        states = lists.compute("l2r", len(planned) * num_positions + np.arange(len(row.token_ids)))
        planned.append(row)
        lists.predict("mlm", states[targets], labels)
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
        """As :class:`MLMPlanner`; raises ValueError for read rows."""
        refuse_read_rows(rows)
        return super().__call__(images, rows)

    def _maskings(self, row: Row) -> list[tuple[Row, np.ndarray, np.ndarray]]:
        generator = row_generator(row.seed)
        chosen = generator.permutation(self.max_text_length)[: max(1, round(self.max_text_length * self.mask_rate))]
        positions = np.sort(chosen[(chosen >= 1) & (chosen < len(row.token_ids) - 1)])
        return [(self._corrupted(row, positions, generator), positions, np.array(row.token_ids)[positions])]


@dataclass(frozen=True)
class PrefixPlanner:
    """AR and PrefixLM: every token after the prefix is predicted from the state before it.

    ``term`` names the loss. ``prefix_share`` of the words (rounded down, at most all but one) and `<s>` see each other;
    0 is AR; null draws the number of words uniformly from 0..k-1 for every row. ``itm`` reads the state of `</s>`.
    In read rows nothing is predicted, so where the number is drawn all words see each other.
    """

    term: str
    vocabulary: Vocabulary
    prefix_share: float | None
    negative_share: float
    full_stop: bool = False

    def __call__(self, images: Tensor, rows: list[Row]) -> Batch:
        """As :class:`MLMPlanner`."""
        num_positions = padded_length(max(len(row.token_ids) for row in rows))
        contrasted = {row.image for row in rows if row.role == "negative"}
        lists = Lists((self.term, "itm"))
        prefixes = []
        for number, row in enumerate(rows):
            ids = np.array(row.token_ids)
            prefixes.append(self._prefix(row))
            if row.role == "placeholder":
                continue
            matched = row.role == "negative" or (row.role == "pair" and row.image in contrasted)
            read_whole = matched or row.role == "read"  # else nobody reads the state of </s>
            cells = number * num_positions + np.arange(len(ids) if read_whole else len(ids) - 1)
            states = lists.compute("l2r", cells)
            if row.role == "pair":
                targets = np.arange(max(prefixes[-1], 1), len(ids))
                lists.predict(self.term, states[targets - 1], ids[targets])
            if matched:
                lists.predict("itm", states[-1:], np.array([int(row.role == "pair")]))
            if row.role == "read":
                lists.read(number, states[-1:])
        return assemble(images, rows, num_positions, self.vocabulary, lists, prefixes)

    def _prefix(self, row: Row) -> int:
        """Number of states that see each other, `<s>` included; 0 where no word is among them."""
        num_words = len(row.token_ids) - 2
        if num_words < 1 or self.prefix_share == 0:
            return 0
        if self.prefix_share is None and row.role == "read":
            share = num_words
        elif self.prefix_share is None:
            share = int(row_generator(row.seed).integers(0, num_words))
        else:
            share = min(int(self.prefix_share * num_words), num_words - 1)
        return share + 1 if share else 0


@dataclass(frozen=True)
class ReleasedARPlanner:
    """AR as released: `<s>` sees all and is seen by none, so the first word is never predicted."""

    vocabulary: Vocabulary
    negative_share: float = 0.0
    full_stop: bool = True

    def __call__(self, images: Tensor, rows: list[Row]) -> Batch:
        """As :class:`MLMPlanner`; there are no negatives. Raises ValueError for read rows."""
        refuse_read_rows(rows)
        num_positions = padded_length(max(len(row.token_ids) for row in rows))
        lists = Lists(("ar",))
        for number, row in enumerate(rows):
            if row.role == "pair":
                ids = np.array(row.token_ids)
                states = lists.compute("l2r", number * num_positions + np.arange(len(ids)))
                lists.predict("ar", states[1:-1], ids[2:])
        return assemble(images, rows, num_positions, self.vocabulary, lists)


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
