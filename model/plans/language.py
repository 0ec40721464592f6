"""Plans of text that a language model reads behind image tokens: what is predicted, from the state before it.

Legend: R rows, T padded length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from model.batch import Batch, Row
from model.config import Vocabulary
from model.language.text_form import TextForm
from model.plans.builder import PlanBuilder, padded_length


@dataclass(frozen=True)
class LanguagePlanner:
    """Each token of a row is predicted, from the state before it, but for what the form reads and ``num_prompt`` words.

    Token t of row r is predicted from position r*T + t of the network's output ``before``. A row that has a ``target``
    names its own number of tokens to be read.
    """

    vocabulary: Vocabulary
    form: TextForm
    num_prompt: int = 0

    def __call__(self, images: Tensor, rows: list[Row]) -> Batch:
        """images uint8 [B, I, 3, H, W]; rows with another role than "pair" have no targets."""
        length, num_read = padded_length(rows), self.form.num_read + self.num_prompt
        builder = PlanBuilder(length, {"caption": ("before", "token")})
        for number, row in enumerate(rows):
            if row.role == "pair":
                ids = np.array(row.token_ids)
                targets = np.arange(num_read if row.target is None else row.target, len(ids))
                builder.add_targets("caption", number * length + targets, ids[targets])
        return builder.build(images, rows, self.vocabulary)
