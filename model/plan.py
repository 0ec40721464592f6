"""Which tokens are computed, which are predicted, and what is hidden from each: host-side planning of a batch.

Pure functions of the rows; every random decision about a row comes from the row's own seed, so a plan does not depend
on rank, worker, or the neighbours in the batch. Legend: n a row's length, k = n-2 its words, T padded length.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from model.batch import Batch, Row, Term
from model.config import Vocabulary

LENGTH_MULTIPLE = 8  # T is rounded up to it: few shapes for compiled kernels


@dataclass
class _Lists:
    """The index lists of a batch while rows are added to it; ``terms`` holds (positions, labels) per term."""

    token_index: list[np.ndarray] = field(default_factory=list)
    query_index: list[np.ndarray] = field(default_factory=list)
    query_span: list[np.ndarray] = field(default_factory=list)
    terms: dict[str, tuple[list, list]] = field(default_factory=dict)
    num_tokens: int = 0
    num_queries: int = 0

    def add_tokens(self, first_cell: int, count: int) -> int:
        """Computes grid cells first_cell .. +count; returns the packed position of the first."""
        start = self.num_tokens
        self.token_index.append(np.arange(first_cell, first_cell + count))
        self.num_tokens += count
        return start

    def add_queries(self, cells: np.ndarray, spans: np.ndarray) -> int:
        """Runs reconstruction queries at grid ``cells`` with hidden ``spans`` [len, 2]; returns the first's position."""
        start = self.num_queries
        self.query_index.append(cells)
        self.query_span.append(spans)
        self.num_queries += len(cells)
        return start

    def add_targets(self, term: str, positions: np.ndarray, labels: np.ndarray) -> None:
        held = self.terms[term]
        held[0].append(positions)
        held[1].append(labels)


@dataclass(frozen=True)
class FLMPlanner:
    """Plans FLM batches of the default behaviour (docs/architecture.md, "Two behaviours of FLM").

    Targets: ``flm`` words 1..n-2 from their queries; ``l2r`` tokens 1..n-1 from the state before; ``r2l`` words 1..n-2
    from the state after; ``itm`` the CLS query of rows that have a negative caption, and of that caption.
    """

    vocabulary: Vocabulary
    corruption_rate: float
    negative_share: float
    full_stop: bool = False

    def __call__(self, images: Tensor, rows: list[Row]) -> Batch:
        """images uint8 [B, I, 3, H, W]; rows 0..B-1 read images 0..B-1, further rows are negatives."""
        num_positions = _padded_length(max(len(row.token_ids) for row in rows))
        contrasted = {row.image for row in rows if row.role == "negative"}
        lists = _Lists(terms={name: ([], []) for name in ("flm", "l2r", "r2l", "itm")})
        for number, row in enumerate(rows):
            first_cell, length = number * num_positions, len(row.token_ids)
            start = lists.add_tokens(first_cell, length)
            if row.role == "pair":
                self._add_language_targets(lists, row, first_cell, start)
            if row.role == "negative" or (row.role == "pair" and row.image in contrasted):
                query = lists.add_queries(np.array([first_cell]), np.array([[length, -1]]))
                lists.add_targets("itm", np.array([query]), np.array([int(row.role == "pair")]))
        return _assemble(images, rows, num_positions, self.vocabulary, lists)

    def _add_language_targets(self, lists: _Lists, row: Row, first_cell: int, start: int) -> None:
        ids, length = np.array(row.token_ids), len(row.token_ids)
        words = np.arange(1, length - 1)
        spans = uniform_spans(length, self.corruption_rate, row_generator(row.seed))
        first_query = lists.add_queries(first_cell + words, spans)
        lists.add_targets("flm", first_query + words - 1, ids[words])
        lists.add_targets("l2r", start + np.arange(length - 1), ids[1:])
        lists.add_targets("r2l", start + words + 1, ids[words])


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
        """As :class:`FLMPlanner`; the first pad of a padded row is computed too, the r2l loss reads its state."""
        longest = max(len(row.token_ids) for row in rows)
        num_positions = _padded_length(min(longest + 1, self.max_text_length))
        lists = _Lists(terms={name: ([], []) for name in ("flm", "l2r", "r2l")})
        for number, row in enumerate(rows):
            first_cell, length = number * num_positions, len(row.token_ids)
            padded = length < self.max_text_length
            start = lists.add_tokens(first_cell, length + int(padded))
            if row.role != "pair":
                continue
            ids, targets = np.array(row.token_ids), np.arange(1, length)
            generator = row_generator(row.seed)
            spans = centred_spans(length, self.max_text_length, self.corruption_rate, generator)
            seen = (spans[:, 0] > 1) | (spans[:, 1] < length - 1)
            first_query = lists.add_queries((first_cell + targets)[seen], spans[seen])
            lists.add_targets("flm", first_query + np.arange(seen.sum()), ids[targets[seen]])
            lists.add_targets("l2r", start + targets[:-1], ids[2:])
            from_states = np.arange(2, length + int(padded))
            lists.add_targets("r2l", start + from_states, ids[from_states - 1])
        return _assemble(images, rows, num_positions, self.vocabulary, lists)


def row_generator(seed: int) -> np.random.Generator:
    """Counter-based generator of a row (Philox), equal on every machine."""
    return np.random.Generator(np.random.Philox(key=seed & (2**64 - 1)))


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
    if num_words < 2 or rate * num_words <= 1:
        return np.stack([target, target], axis=1)
    probability = min((rate * num_words - 1) / (num_words - 1), 1.0)
    size = 1 + generator.binomial(num_words - 1, probability, num_words)
    first = np.maximum(1, target - size + 1)
    last = np.minimum(target, num_words - size + 1)
    lo = first + np.floor(generator.random(num_words) * (last - first + 1)).astype(np.int64)
    return np.stack([lo, lo + size - 1], axis=1)


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


def _padded_length(longest: int) -> int:
    return -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def _assemble(images: Tensor, rows: list[Row], num_positions: int, vocabulary: Vocabulary, lists: _Lists) -> Batch:
    if [row.image for row in rows[: len(images)]] != list(range(len(images))):
        raise ValueError("rows 0..B-1 must read images 0..B-1, negatives follow")
    text = np.full((len(rows), num_positions), vocabulary.pad_id)
    for number, row in enumerate(rows):
        text[number, : len(row.token_ids)] = row.token_ids
    return Batch(
        images=images,
        text=torch.from_numpy(text),
        lengths=torch.tensor([len(row.token_ids) for row in rows]),
        image_of_row=torch.tensor([row.image for row in rows]),
        token_index=_joined(lists.token_index),
        query_index=_joined(lists.query_index),
        query_span=_joined(lists.query_span).view(-1, 2),
        terms={name: Term(_joined(held[0]), _joined(held[1])) for name, held in lists.terms.items()},
    )


def _joined(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64)) if parts else torch.zeros(0, dtype=torch.int64)
