"""Plans of captions that FLM reads in both directions.

Legend: n a row's length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from model.batch import Batch, Kind, Row
from model.config import Vocabulary
from model.plans.builder import PlanBuilder, padded_length, row_generator
from model.plans.spans import centred_word_spans, uniform_spans

TERMS: dict[str, tuple[str, Kind]] = {
    "caption": ("l2r", "token"),
    "r2l": ("r2l", "token"),
    "flm": ("queries", "token"),
}


@dataclass(frozen=True)
class BothWaysPlanner:
    """Each word of a caption after the first ``num_read`` tokens is predicted from either side, as in pretraining
    (:class:`model.plans.flm.FLMPlanner`).

    Targets, of the ``terms`` that are wanted: ``caption`` tokens num_read..n-1 from the l2r state before, ``r2l`` words
    num_read..n-2 from the r2l state after, which `</s>` begins, and ``flm`` the same words from their reconstruction
    queries. With ``corruption_rate`` 0 each word alone is hidden from its query. States that nobody reads are not
    computed.
    """

    vocabulary: Vocabulary
    num_read: int
    terms: tuple[str, ...]
    corruption_rate: float = 0.0
    centred: bool = False

    def __call__(self, images: Tensor, rows: list[Row]) -> Batch:
        """images uint8 [B, I, 3, H, W]; any row may read any image. Rows with another role than "pair" have no
        targets."""
        builder = PlanBuilder(padded_length(rows), {name: TERMS[name] for name in self.terms})
        for number, row in enumerate(rows):
            if row.role == "pair":
                self._predict(builder, row, number)
        return builder.build(images, rows, self.vocabulary)

    def _predict(self, builder: PlanBuilder, row: Row, number: int) -> None:
        ids, length = np.array(row.token_ids), len(row.token_ids)
        words = np.arange(self.num_read, length - 1)
        if "caption" in self.terms or "flm" in self.terms:
            l2r = builder.add_states("l2r", number, np.arange(length - 1))
        if "caption" in self.terms:
            builder.add_targets("caption", l2r[self.num_read - 1 :], ids[self.num_read :])
        r2l = builder.add_states("r2l", number, words + 1)
        if "r2l" in self.terms:
            builder.add_targets("r2l", r2l, ids[words])
        if "flm" in self.terms:
            place = centred_word_spans if self.centred else uniform_spans
            spans = place(length, self.corruption_rate, row_generator(row.seed))[self.num_read - 1 :]
            builder.add_targets("flm", builder.add_queries(number, words, spans), ids[words])
