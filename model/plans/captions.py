"""Plans of captioning: how a caption is written as tokens, and each of them predicted from what stands left of it.

Legend: n a row's length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from model.batch import Batch, Row
from model.config import Vocabulary
from model.plans.builder import PlanBuilder, padded_length, row_generator
from model.plans.spans import centred_spans

ADDED_TOKENS = 2  # the release's `<bos>` and `<eos>`, the last two of the vocabulary


@dataclass(frozen=True)
class CaptionForm:
    """A caption as tokens: ``<s> begin.. words.. end.. </s>``; ``vocabulary`` counts the tokens that it adds.

    Default behaviour adds none: ``<s>`` begins a caption and ``</s>`` ends it. The release appends two tokens to the
    vocabulary and writes ``<s> <bos> words <eos> </s>``, as its ``<s>`` is seen by no word (specification section 7.3).
    """

    vocabulary: Vocabulary
    begin: tuple[int, ...] = ()
    end: tuple[int, ...] = ()

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens any of which ends a caption."""
        return self.vocabulary.eos_id, *self.end

    def write(self, words: Sequence[int], max_length: int) -> list[int]:
        """The row of a caption's ``words``, at most ``max_length`` tokens; a long one loses its end, never ``</s>``."""
        ids = [self.vocabulary.bos_id, *self.begin, *words, *self.end]
        return [*ids[: max_length - 1], self.vocabulary.eos_id]


def caption_form(vocabulary: Vocabulary, released: bool) -> CaptionForm:
    """The form of captions of a behaviour; ``vocabulary`` is the tokenizer's."""
    if not released:
        return CaptionForm(vocabulary)
    size = vocabulary.size
    word_starts = vocabulary.word_starts and vocabulary.word_starts + bytes(ADDED_TOKENS)
    return CaptionForm(replace(vocabulary, size=size + ADDED_TOKENS, word_starts=word_starts), (size,), (size + 1,))


@dataclass(frozen=True)
class CaptionPlanner:
    """Each token after the first ``num_read`` of a row is predicted from the l2r state before it.

    ``num_read`` counts ``<s>``, the form's begin and the prompt; a row that has a ``target`` names its own number.
    States are computed from the position ``first_state`` on: 1 where nobody sees ``<s>``.
    """

    vocabulary: Vocabulary
    num_read: int
    first_state: int = 0

    def __call__(self, images: Tensor, rows: list[Row]) -> Batch:
        """images uint8 [B, I, 3, H, W]; any row may read any image. Rows with another role than "pair" have no
        targets."""
        builder = PlanBuilder(padded_length(rows), {"caption": ("l2r", "token")})
        for number, row in enumerate(rows):
            if row.role == "pair":
                ids = np.array(row.token_ids)
                states = builder.add_states("l2r", number, np.arange(self.first_state, len(ids) - 1))
                targets = np.arange(self.num_read if row.target is None else row.target, len(ids))
                builder.add_targets("caption", states[targets - 1 - self.first_state], ids[targets])
        return builder.build(images, rows, self.vocabulary)


@dataclass(frozen=True)
class ReleasedCaptionPlanner:
    """As the release trains captions with FLM's network: the query of position i predicts token i+1.

    # NOTE release: this leaks. Query i reads the r2l states from i+1 on, and those know token i+1; captions are then
    decoded from l2r states, which this loss trains only as keys of the reconstructor. The sound loss of the same text
    form is that of the objective ar in released behaviour.
    """

    vocabulary: Vocabulary
    num_read: int
    corruption_rate: float
    max_text_length: int

    def __call__(self, images: Tensor, rows: list[Row]) -> Batch:
        """As :class:`CaptionPlanner`; a query that may see nothing has no target (:mod:`model.plans.flm`)."""
        builder = PlanBuilder(padded_length(rows), {"caption": ("queries", "token")})
        for number, row in enumerate(rows):
            if row.role != "pair":
                continue
            ids, length = np.array(row.token_ids), len(row.token_ids)
            for stream in ("l2r", "r2l"):
                builder.add_states(stream, number, np.arange(1, length))
            places = np.arange(self.num_read - 1, length - 1)
            spans = centred_spans(length, self.max_text_length, self.corruption_rate, row_generator(row.seed))
            spans = spans[places - 1]  # they begin with that of position 1
            seen = (spans[:, 0] > 1) | (spans[:, 1] < length - 1)
            queries = builder.add_queries(number, places[seen], spans[seen])
            builder.add_targets("caption", queries, ids[places[seen] + 1])
        return builder.build(images, rows, self.vocabulary)
