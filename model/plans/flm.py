"""Plans of FLM: which states and queries are computed, what is hidden from each target.

Legend: n a row's length, k = n-2 its words.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from model.batch import Batch, Row
from model.config import Vocabulary
from model.plans.builder import PlanBuilder, matched_rows, padded_length, round_up, row_generator
from model.plans.spans import centred_spans, centred_word_spans, uniform_spans

QUERY_STREAM, L2R_STREAM, R2L_STREAM, SHARE_STREAM = 2, 3, 4, 5  # of a row's generator
LANGUAGE_TERMS = {"flm": ("queries", "token"), "l2r": ("l2r", "token"), "r2l": ("r2l", "token")}


@dataclass(frozen=True)
class FLMPlanner:
    """Plans FLM batches of the default behaviour (docs/architecture.md, "Two behaviours of FLM").

    Targets: ``flm`` words 1..n-2, or ``query_rate`` of them, from their queries; ``l2r`` tokens 1..n-1 from the state
    before, ``r2l`` words 1..n-2 from the state after, or ``stream_rate`` of them; ``itm`` the CLS query of rows that
    have a negative caption, and of that caption. Read rows have a CLS query too, and all states. With ``every_word``
    each word has its state in both streams, whoever reads it. Of a caption that is not among ``reconstruction_share``
    of all only ``l2r`` is predicted.
    """

    vocabulary: Vocabulary
    corruption_rate: float
    negative_share: float
    full_stop: bool = False
    centred: bool = False
    query_rate: float = 1.0
    stream_rate: float = 1.0
    reconstruction_share: float = 1.0
    every_word: bool = False

    def __call__(self, images: Tensor, rows: list[Row]) -> Batch:
        """images uint8 [B, I, 3, H, W]; any row may read any image."""
        builder = PlanBuilder(padded_length(rows), LANGUAGE_TERMS | {"itm": ("queries", "class")})
        matched = matched_rows(rows)
        for number, row in enumerate(rows):
            if row.role == "read":
                builder.add_feature("queries", number, add_cls_query(builder, row, number))
            if number in matched:
                builder.add_targets("itm", add_cls_query(builder, row, number), [matched[number]])
            if row.role == "pair":
                self._predict_words(builder, row, number, all_states=number in matched)
        return builder.build(images, rows, self.vocabulary)

    def _predict_words(self, builder: PlanBuilder, row: Row, number: int, all_states: bool) -> None:
        """Targets of a pair. Without a CLS query nobody reads the l2r state of `</s>`, nor r2l's of `<s>` and w1."""
        ids, length = np.array(row.token_ids), len(row.token_ids)
        l2r_stop, r2l_start = (length, 0) if all_states else (length - 1, 1 if self.every_word else 2)
        l2r = builder.add_states("l2r", number, np.arange(l2r_stop))
        forward = _drawn(length - 1, self.stream_rate, row.seed, L2R_STREAM)
        builder.add_targets("l2r", l2r[forward], ids[1:][forward])
        reconstructed = row_generator(row.seed, SHARE_STREAM).random() < self.reconstruction_share
        if reconstructed or all_states or self.every_word:
            r2l = builder.add_states("r2l", number, np.arange(r2l_start, length))
        if reconstructed:
            self._reconstruct(builder, row, number, r2l[2 - r2l_start :])

    def _reconstruct(self, builder: PlanBuilder, row: Row, number: int, r2l: np.ndarray) -> None:
        """Targets that see both sides of a word, and those of the reverse stream: ``r2l``, the states behind words."""
        ids, length = np.array(row.token_ids), len(row.token_ids)
        words = np.arange(1, length - 1)
        place = centred_word_spans if self.centred else uniform_spans
        spans = place(length, self.corruption_rate, row_generator(row.seed))
        chosen = _drawn(len(words), self.query_rate, row.seed, QUERY_STREAM)
        queries = builder.add_queries(number, words[chosen], spans[chosen])
        builder.add_targets("flm", queries, ids[words[chosen]])
        reverse = _drawn(len(words), self.stream_rate, row.seed, R2L_STREAM)
        builder.add_targets("r2l", r2l[reverse], ids[words][reverse])


@dataclass(frozen=True)
class ReleasedPlanner:
    """Plans FLM batches as the public release does, its leaks and trivial targets included (specification section 5).

    # NOTE release: a query whose span hides everything attends to everything, its own target included; here: such a
    target is dropped, because no output may depend on the token it predicts beyond the quirks that fixed parity needs.
    # NOTE release: a text that is only read has all its queries run; here: the CLS query, the only one whose output is
    used. It reads every real state of both streams, those of `<s>` too, which see the whole text.
    """

    vocabulary: Vocabulary
    corruption_rate: float
    max_text_length: int
    negative_share: float = 0.0
    full_stop: bool = True

    def __call__(self, images: Tensor, rows: list[Row]) -> Batch:
        """As :class:`FLMPlanner`; the first pad of a padded pair is computed too, the r2l loss reads its state."""
        longest = max(len(row.token_ids) for row in rows)
        builder = PlanBuilder(round_up(min(longest + 1, self.max_text_length)), LANGUAGE_TERMS)
        for number, row in enumerate(rows):
            if row.role == "read":
                builder.add_feature("queries", number, add_cls_query(builder, row, number))
            if row.role == "pair":
                self._predict_words(builder, row, number)
        return builder.build(images, rows, self.vocabulary)

    def _predict_words(self, builder: PlanBuilder, row: Row, number: int) -> None:
        ids, length = np.array(row.token_ids), len(row.token_ids)
        stop = min(length + 1, self.max_text_length)  # one past the states: the first pad is among them
        l2r = builder.add_states("l2r", number, np.arange(stop))
        r2l = builder.add_states("r2l", number, np.arange(stop))
        targets = np.arange(1, length)
        spans = centred_spans(length, self.max_text_length, self.corruption_rate, row_generator(row.seed))
        seen = (spans[:, 0] > 1) | (spans[:, 1] < length - 1)
        builder.add_targets("flm", builder.add_queries(number, targets[seen], spans[seen]), ids[targets[seen]])
        builder.add_targets("l2r", l2r[targets[:-1]], ids[2:])
        builder.add_targets("r2l", r2l[2:], ids[np.arange(1, stop - 1)])


def _drawn(count: int, rate: float, seed: int, stream: int) -> np.ndarray:
    """Which of ``count`` things are taken, in order: on average ``rate`` of them, at least one of any."""
    if rate == 1 or count == 0:
        return np.arange(count)
    generator = row_generator(seed, stream)
    number = max(1, int(rate * count + generator.random()))
    return np.sort(generator.choice(count, number, replace=False))


def add_cls_query(builder: PlanBuilder, row: Row, number: int) -> np.ndarray:
    """A row's CLS query and the states it reads, which a pair has anyway; returns its packed position."""
    length = len(row.token_ids)
    if row.role != "pair":
        builder.add_states("l2r", number, np.arange(length))
        builder.add_states("r2l", number, np.arange(length))
    return builder.add_queries(number, np.array([0]), np.array([[length, -1]]))
