"""Builds a batch with a text plan row by row: which states are computed, what is predicted from them.

Planning happens on the host. Every random decision about a row comes from the row's own seed, so a plan does not depend
on rank, worker, or the neighbours in the batch. Legend: B samples, I images per sample, R rows, T padded text length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from model.batch import Batch, Kind, Row, Term, TextPlan
from model.config import Vocabulary

LENGTH_MULTIPLE = 8  # T is rounded up to it: few shapes for compiled kernels


class PlanBuilder:
    """The index lists and targets of a batch while rows are added to it.

    A cell is a flat position r*T+t of the padded grid of rows; a packed position counts the states of one stream, or
    the queries, in the order in which they were added.
    """

    def __init__(self, num_positions: int, terms: Mapping[str, tuple[str, Kind]]) -> None:
        """``num_positions``: T; ``terms``: of each loss term the network output it is predicted from, and its kind."""
        self.num_positions = num_positions
        self._cells: dict[str, list[np.ndarray]] = {"l2r": [], "r2l": [], "queries": []}
        self._sizes = dict.fromkeys(self._cells, 0)
        self._spans: list[np.ndarray] = []
        self._terms = dict(terms)
        self._targets: dict[str, tuple[list, list]] = {name: ([], []) for name in terms}

    def add_states(self, stream: str, row: int, positions: np.ndarray) -> np.ndarray:
        """Compute the states of a stream at text ``positions`` of a row; returns their packed positions."""
        return self._add(stream, row * self.num_positions + positions)

    def add_queries(self, row: int, positions: np.ndarray, spans: np.ndarray) -> np.ndarray:
        """Run reconstruction queries at ``positions`` of a row with hidden ``spans`` [len, 2]; as ``add_states``."""
        self._spans.append(spans)
        return self._add("queries", row * self.num_positions + positions)

    def add_targets(self, term: str, packed: np.ndarray, targets: np.ndarray | Sequence[int]) -> None:
        """Predict ``targets`` from the states, or queries, at ``packed`` positions."""
        positions, held = self._targets[term]
        positions.append(packed)
        held.append(np.asarray(targets))

    def add_feature(self, source: str, row: int, packed: np.ndarray) -> None:
        """Give out the feature of a row that is only read; its CLS state stands at ``packed`` [1] of ``source``."""
        self._terms.setdefault("read", (source, "feature"))
        self._targets.setdefault("read", ([], []))
        self.add_targets("read", packed, [row])

    def build(
        self, images: Tensor, rows: Sequence[Row], vocabulary: Vocabulary, prefix: Sequence[int] | None = None
    ) -> Batch:
        """The batch; images uint8 [B, I, 3, H, W], ``prefix`` as in :class:`TextPlan`, one a row, all 0 if not given.

        Raises:
            ValueError: a row reads an image that is not there.
        """
        read = [row.image for row in rows]
        num_images = images.shape[0] * images.shape[1]
        if not 0 <= min(read) <= max(read) < num_images:
            raise ValueError(f"rows read images {min(read)} to {max(read)}, expected 0 to {num_images - 1}")
        text = np.full((len(rows), self.num_positions), vocabulary.pad_id)
        for number, row in enumerate(rows):
            text[number, : len(row.token_ids)] = row.token_ids
        plan = TextPlan(
            text=torch.from_numpy(text),
            lengths=torch.tensor([len(row.token_ids) for row in rows]),
            image_of_row=torch.tensor(read),
            l2r_index=_joined(self._cells["l2r"]),
            r2l_index=_joined(self._cells["r2l"]),
            query_index=_joined(self._cells["queries"]),
            query_span=_joined(self._spans).view(-1, 2),
            prefix=torch.tensor(prefix or [0] * len(rows)),
            num_paired=num_images if read[:num_images] == list(range(num_images)) else 0,
        )
        terms = {}
        for name, (source, kind) in self._terms.items():
            position, target = map(_joined, self._targets[name])
            terms[name] = Term(source, position, target, kind)
        return Batch(images, terms, plan=plan)

    def _add(self, kind: str, cells: np.ndarray) -> np.ndarray:
        start = self._sizes[kind]
        self._cells[kind].append(cells)
        self._sizes[kind] += len(cells)
        return np.arange(start, self._sizes[kind])


def matched_rows(rows: Sequence[Row]) -> dict[int, int]:
    """Number -> class of the rows that image-text matching judges: negatives (0), and of the pairs on the image of one
    that which comes first (1)."""
    contrasted = {row.image for row in rows if row.role == "negative"}
    found: dict[int, int] = {}
    for number, row in enumerate(rows):
        if row.role == "negative" or (row.role == "pair" and row.image in contrasted):
            found[number] = int(row.role == "pair")
            if row.role == "pair":
                contrasted.discard(row.image)
    return found


def padded_length(rows: Sequence[Row]) -> int:
    """T for these rows."""
    return round_up(max(len(row.token_ids) for row in rows))


def round_up(length: int) -> int:
    return -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def row_generator(seed: int, stream: int = 0) -> np.random.Generator:
    """Counter-based generator of a row (Philox), equal on every machine; its streams are independent."""
    return np.random.Generator(np.random.Philox(key=stream << 64 | seed & (2**64 - 1)))


def _joined(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64)) if parts else torch.zeros(0, dtype=torch.int64)
