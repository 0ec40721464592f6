"""Which tokens are computed, which are predicted, and what is hidden from each: host-side planning of a batch.

Pure functions of the rows; every random decision about a row comes from the row's own seed, so a plan does not depend
on rank, worker, or the neighbours in the batch. Legend: n a row's length, k = n-2 its words, T padded length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.batch import Batch, Row, Term
from model.config import Vocabulary

LENGTH_MULTIPLE = 8  # T is rounded up to it: few shapes for compiled kernels


class Lists:
    """The index lists of a batch while rows are added to it."""

    def __init__(self, terms: tuple[str, ...]) -> None:
        self.cells: dict[str, list[np.ndarray]] = {"l2r": [], "r2l": [], "query": []}
        self.sizes = dict.fromkeys(self.cells, 0)
        self.spans: list[np.ndarray] = []
        self.targets: dict[str, tuple[list, list]] = {name: ([], []) for name in terms}

    def compute(self, kind: str, cells: np.ndarray) -> np.ndarray:
        """Has the grid ``cells`` of a stream (or queries) computed; returns their positions in the packed list."""
        start = self.sizes[kind]
        self.cells[kind].append(cells)
        self.sizes[kind] += len(cells)
        return np.arange(start, self.sizes[kind])

    def query(self, cells: np.ndarray, spans: np.ndarray) -> np.ndarray:
        """Runs reconstruction queries at grid ``cells`` with hidden ``spans`` [len, 2]; returns their positions."""
        self.spans.append(spans)
        return self.compute("query", cells)

    def predict(self, term: str, positions: np.ndarray, labels: np.ndarray) -> None:
        held_positions, held_labels = self.targets[term]
        held_positions.append(positions)
        held_labels.append(labels)

    def read(self, row: int, position: np.ndarray) -> None:
        """Notes where the CLS feature of a read row stands, [1]."""
        self.targets.setdefault("read", ([], []))
        self.predict("read", position, np.array([row]))


@dataclass(frozen=True)
class FLMPlanner:
    """Plans FLM batches of the default behaviour (docs/architecture.md, "Two behaviours of FLM").

    Targets: ``flm`` words 1..n-2 from their queries; ``l2r`` tokens 1..n-1 from the state before; ``r2l`` words 1..n-2
    from the state after; ``itm`` the CLS query of rows that have a negative caption, and of that caption. Read rows
    have a CLS query too, and all states.
    """

    vocabulary: Vocabulary
    corruption_rate: float
    negative_share: float
    full_stop: bool = False
    centred: bool = False

    def __call__(self, images: Tensor, rows: list[Row]) -> Batch:
        """images uint8 [B, I, 3, H, W]; rows 0..B-1 read images 0..B-1, further rows are negatives.

        Where a row has the role "read", all rows may read any image.
        """
        num_positions = padded_length(max(len(row.token_ids) for row in rows))
        contrasted = {row.image for row in rows if row.role == "negative"}
        lists = Lists(("flm", "l2r", "r2l", "itm"))
        for number, row in enumerate(rows):
            first_cell = number * num_positions
            if row.role == "read":
                lists.read(number, self._look_at_all(lists, row, first_cell))
            if row.role == "negative" or (row.role == "pair" and row.image in contrasted):
                self._match(lists, row, first_cell)
            if row.role == "pair":
                self._predict_words(lists, row, first_cell, all_states=row.image in contrasted)
        return assemble(images, rows, num_positions, self.vocabulary, lists)

    def _match(self, lists: Lists, row: Row, first_cell: int) -> None:
        """The CLS query of a row says whether the caption belongs to the image."""
        lists.predict("itm", self._look_at_all(lists, row, first_cell), np.array([int(row.role == "pair")]))

    def _look_at_all(self, lists: Lists, row: Row, first_cell: int) -> np.ndarray:
        """Has a row's CLS query computed and the states it reads, which a pair has anyway; returns its position."""
        length = len(row.token_ids)
        if row.role != "pair":
            lists.compute("l2r", first_cell + np.arange(length))
            lists.compute("r2l", first_cell + np.arange(length))
        return lists.query(np.array([first_cell]), np.array([[length, -1]]))

    def _predict_words(self, lists: Lists, row: Row, first_cell: int, all_states: bool) -> None:
        """Targets of a pair. Without a CLS query nobody reads the l2r state of `</s>`, nor r2l's of `<s>` and w1."""
        ids, length = np.array(row.token_ids), len(row.token_ids)
        words = np.arange(1, length - 1)
        l2r_stop, r2l_start = (length, 0) if all_states else (length - 1, 2)
        l2r = lists.compute("l2r", first_cell + np.arange(l2r_stop))
        r2l = lists.compute("r2l", first_cell + np.arange(r2l_start, length))
        place = centred_word_spans if self.centred else uniform_spans
        spans = place(length, self.corruption_rate, row_generator(row.seed))
        lists.predict("flm", lists.query(first_cell + words, spans), ids[words])
        lists.predict("l2r", l2r[: length - 1], ids[1:])
        lists.predict("r2l", r2l[2 - r2l_start :], ids[words])


@dataclass(frozen=True)
class ReleasedPlanner:
    """Plans FLM batches as the public release does, its leaks and trivial targets included (specification section 5).

    # NOTE release: a query whose span hides everything attends to everything, its own target included; here: such a
    target is dropped, because no output may depend on the token it predicts beyond the quirks that fixed parity needs.
    """

    vocabulary: Vocabulary
    corruption_rate: float
    max_text_length: int
    negative_share: float = 0.0
    full_stop: bool = True

    def __call__(self, images: Tensor, rows: list[Row]) -> Batch:
        """As :class:`FLMPlanner`; the first pad of a padded row is computed too, the r2l loss reads its state.

        Raises:
            ValueError: a row has the role "read".
        """
        refuse_read_rows(rows)
        longest = max(len(row.token_ids) for row in rows)
        num_positions = padded_length(min(longest + 1, self.max_text_length))
        lists = Lists(("flm", "l2r", "r2l"))
        for number, row in enumerate(rows):
            if row.role == "pair":
                self._predict_words(lists, row, number * num_positions)
        return assemble(images, rows, num_positions, self.vocabulary, lists)

    def _predict_words(self, lists: Lists, row: Row, first_cell: int) -> None:
        ids, length = np.array(row.token_ids), len(row.token_ids)
        stop = min(length + 1, self.max_text_length)  # one past the states: the first pad is among them
        l2r = lists.compute("l2r", first_cell + np.arange(stop))
        r2l = lists.compute("r2l", first_cell + np.arange(stop))
        targets = np.arange(1, length)
        spans = centred_spans(length, self.max_text_length, self.corruption_rate, row_generator(row.seed))
        seen = (spans[:, 0] > 1) | (spans[:, 1] < length - 1)
        lists.predict("flm", lists.query((first_cell + targets)[seen], spans[seen]), ids[targets[seen]])
        lists.predict("l2r", l2r[targets[:-1]], ids[2:])
        lists.predict("r2l", r2l[2:], ids[np.arange(1, stop - 1)])


def row_generator(seed: int, stream: int = 0) -> np.random.Generator:
    """Counter-based generator of a row (Philox), equal on every machine; its streams are independent."""
    return np.random.Generator(np.random.Philox(key=stream << 64 | seed & (2**64 - 1)))


def uniform_spans(length: int, rate: float, generator: np.random.Generator) -> np.ndarray:
    """Hidden spans (lo, hi) of the word targets 1..n-2, placed uniformly inside the caption.

    A span's size is 1 + Binomial(k-1, p) with p such that its mean is max(rate*k, 1); its place is uniform among those
    that contain the target and stay within the words, so the hidden share equals ``rate`` at every position.

    # NOTE release: spans are centred and lose what sticks out beyond the end; here they move inside, so that targets at
    the ends are corrupted as much as those in the middle.

    Returns:
        int64 [k, 2].
    """
    num_words = length - 2
    target = np.arange(1, length - 1)
    size = _span_sizes(num_words, rate, generator)
    first = np.maximum(1, target - size + 1)
    last = np.minimum(target, num_words - size + 1)
    lo = first + np.floor(generator.random(num_words) * (last - first + 1)).astype(np.int64)
    return np.stack([lo, lo + size - 1], axis=1)


def centred_word_spans(length: int, rate: float, generator: np.random.Generator) -> np.ndarray:
    """Hidden spans of the word targets 1..n-2, of the sizes of :func:`uniform_spans` but centred on their target.

    Left and right differ by at most one; what would stick out at an end of the words moves inside.

    Returns:
        int64 [k, 2].
    """
    num_words = length - 2
    target = np.arange(1, length - 1)
    size = _span_sizes(num_words, rate, generator)
    left = (size - 1) // 2 + (size - 1) % 2 * generator.integers(0, 2, num_words)
    lo = np.clip(target - left, 1, num_words - size + 1)
    return np.stack([lo, lo + size - 1], axis=1)


def _span_sizes(num_words: int, rate: float, generator: np.random.Generator) -> np.ndarray:
    """1 + Binomial(k-1, p) for each word, its mean max(rate*k, 1)."""
    if num_words < 2 or rate * num_words <= 1:
        return np.ones(num_words, dtype=np.int64)
    probability = min((rate * num_words - 1) / (num_words - 1), 1.0)
    return 1 + generator.binomial(num_words - 1, probability, num_words)


def centred_spans(length: int, max_length: int, rate: float, generator: np.random.Generator) -> np.ndarray:
    """Hidden spans of the targets 1..n-1 as the release draws them (specification section 3.1).

    Returns:
        int64 [n-1, 2].
    """
    target = np.arange(1, length)
    if rate <= 0:
        return np.stack([target, target], axis=1)
    candidates = length - 1
    probability = max(0.0, (rate * candidates - 1) / (candidates - 1 + 1e-5))
    extra = generator.binomial(candidates - 1, min(probability, 1.0), candidates)
    left = extra // 2 + (extra % 2) * generator.integers(0, 2, candidates)
    lo = np.maximum(target - left, 0)
    hi = np.minimum(lo + extra, max_length - 1)
    # Own position is hidden in both halves whatever the clipping did.
    return np.stack([np.minimum(lo, target), np.maximum(hi, target)], axis=1)


def padded_length(longest: int) -> int:
    return -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def assemble(
    images: Tensor,
    rows: list[Row],
    num_positions: int,
    vocabulary: Vocabulary,
    lists: Lists,
    prefix: list[int] | None = None,
) -> Batch:
    """The batch of planned rows; ``prefix`` as in :class:`Batch`, one a row, all 0 if not given."""
    read = [row.image for row in rows]
    if any(row.role == "read" for row in rows):
        if not 0 <= min(read) <= max(read) < len(images):
            raise ValueError(f"rows read images {min(read)} to {max(read)}, expected 0 to {len(images) - 1}")
    elif read[: len(images)] != list(range(len(images))):
        raise ValueError("rows 0..B-1 must read images 0..B-1, negatives follow")
    text = np.full((len(rows), num_positions), vocabulary.pad_id)
    for number, row in enumerate(rows):
        text[number, : len(row.token_ids)] = row.token_ids
    return Batch(
        images=images,
        text=torch.from_numpy(text),
        lengths=torch.tensor([len(row.token_ids) for row in rows]),
        image_of_row=torch.tensor(read),
        l2r_index=_joined(lists.cells["l2r"]),
        r2l_index=_joined(lists.cells["r2l"]),
        query_index=_joined(lists.cells["query"]),
        query_span=_joined(lists.spans).view(-1, 2),
        prefix=torch.tensor(prefix or [0] * len(rows)),
        terms={name: Term(*map(_joined, held)) for name, held in lists.targets.items()},
    )


def refuse_read_rows(rows: list[Row]) -> None:
    """Raises ValueError where a row has the role "read", which released planners do not know."""
    if any(row.role == "read" for row in rows):
        raise ValueError("released behaviour computes no features of read rows; use model.behaviour default")


def _joined(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64)) if parts else torch.zeros(0, dtype=torch.int64)
