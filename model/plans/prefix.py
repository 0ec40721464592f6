"""Plans of AR and PrefixLM: tokens after the prefix are predicted from the state before (specification section 4).

Legend: k words of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from model.batch import Batch, Row
from model.config import Vocabulary
from model.plans.builder import PlanBuilder, matched_rows, padded_length, row_generator


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
        """images uint8 [B, I, 3, H, W]; any row may read any image."""
        builder = PlanBuilder(padded_length(rows), {self.term: ("l2r", "token"), "itm": ("l2r", "class")})
        matched = matched_rows(rows)
        prefixes = []
        for number, row in enumerate(rows):
            ids = np.array(row.token_ids)
            prefixes.append(self._prefix(row))
            if row.role == "placeholder":
                continue
            read_whole = number in matched or row.role == "read"  # else nobody reads the state of </s>
            states = builder.add_states("l2r", number, np.arange(len(ids) if read_whole else len(ids) - 1))
            if row.role == "pair":
                targets = np.arange(max(prefixes[-1], 1), len(ids))
                builder.add_targets(self.term, states[targets - 1], ids[targets])
            if number in matched:
                builder.add_targets("itm", states[-1:], [matched[number]])
            if row.role == "read":
                builder.add_feature("l2r", number, states[-1:])
        return builder.build(images, rows, self.vocabulary, prefixes)

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
    """AR as released: `<s>` sees all and is seen by none, so the first word is never predicted; in read rows it is the
    CLS state."""

    vocabulary: Vocabulary
    negative_share: float = 0.0
    full_stop: bool = True

    def __call__(self, images: Tensor, rows: list[Row]) -> Batch:
        """As :class:`PrefixPlanner`; there are no negatives."""
        builder = PlanBuilder(padded_length(rows), {"ar": ("l2r", "token")})
        for number, row in enumerate(rows):
            if row.role not in ("pair", "read"):
                continue
            ids = np.array(row.token_ids)
            states = builder.add_states("l2r", number, np.arange(len(ids)))
            if row.role == "read":
                builder.add_feature("l2r", number, states[:1])
            else:
                builder.add_targets("ar", states[1:-1], ids[2:])
        return builder.build(images, rows, self.vocabulary)
