"""Plans of text that a language model reads behind image tokens: what is predicted, from the state before it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.batch import Batch, LanguagePlan, Row, Term
from model.config import Vocabulary
from model.language.text_form import TextForm
from model.plans.builder import round_up, row_generator


@dataclass(frozen=True)
class LanguagePlanner:
    """Each token of a row is predicted, from the state before it, but for what the form reads and ``num_prompt`` words.

    Rows about one sample stand in one sequence behind the tokens of its image or video, which are computed once so.
    Token j of sequence s of the plan is predicted from position s*L + j of the network's output ``before``. A row that
    has a ``target`` names its own number of tokens to be read.
    """

    vocabulary: Vocabulary
    form: TextForm
    num_prompt: int = 0
    tokens: tuple[int, int] | None = None  # fewest and most of an image, drawn from the seed of the first row

    def __call__(self, images: Tensor, rows: list[Row]) -> Batch:
        """images uint8 [B, I, 3, H, W]; rows with another role than "pair" have no targets.

        Raises:
            ValueError: a row reads an image that is not there.
        """
        by_sample: dict[int, list[Row]] = {}
        for row in rows:
            by_sample.setdefault(row.image // images.shape[1], []).append(row)
        if not 0 <= min(by_sample) <= max(by_sample) < len(images):
            raise ValueError(f"rows read samples {min(by_sample)} to {max(by_sample)}, expected 0 to {len(images) - 1}")
        lengths = [sum(len(row.token_ids) for row in of_sample) for of_sample in by_sample.values()]
        shape = (len(by_sample), round_up(max(lengths)))
        text, number = np.full(shape, self.vocabulary.pad_id), np.full(shape, -1)
        place, predicted = np.zeros(shape, np.int64), np.zeros(shape, bool)
        for sequence, of_sample in enumerate(by_sample.values()):
            start = 0
            for which, row in enumerate(of_sample):
                stop = start + len(row.token_ids)
                text[sequence, start:stop], number[sequence, start:stop] = row.token_ids, which
                place[sequence, start:stop] = np.arange(stop - start)
                num_read = self.form.num_read + self.num_prompt if row.target is None else row.target
                predicted[sequence, start + num_read : stop] = row.role == "pair"
                start = stop
        plan = LanguagePlan(
            *map(torch.from_numpy, (text, np.array(lengths), np.array(list(by_sample)), number, place)),
            num_tokens=0 if self.tokens is None else _draw(*self.tokens, rows[0].seed),
        )
        positions = torch.from_numpy(np.flatnonzero(predicted))
        return Batch(images, {"caption": Term("before", positions, plan.text.flatten()[positions])}, plan=plan)


def _draw(fewest: int, most: int, seed: int) -> int:
    """A number from ``fewest`` to ``most``, all of them as probable."""
    return int(row_generator(seed, stream=1).integers(fewest, most + 1))
