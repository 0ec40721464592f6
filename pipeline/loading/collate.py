"""How samples become a batch: cleaned captions, rows and their seeds, placeholders for the unusable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from model.batch import Batch, Planner, Row
from pipeline.data.order import mix_words


class Item(NamedTuple):
    """One sample without its pixels, which stand in the batch's image tensor already.

    ``token_ids`` and ``negative_ids`` (another sample's caption, or None) are ``<s> .. </s>``. An unusable sample has
    its reason in ``problem``, and ``<s></s>`` as tokens; its image is black.
    """

    key: str
    seed: int
    token_ids: list[int]
    negative_ids: list[int] | None = None
    problem: str | None = None


def collate(items: Sequence[Item], images: Tensor, planner: Planner) -> Batch:
    """B items and their images, uint8 [B, I, 3, S, S], to a batch of R >= B rows: own captions first, then negatives.

    An unusable item keeps its slot: its row has the role "placeholder", its name stands in ``Batch.problems``.
    """
    rows, negatives = [], []
    for number, item in enumerate(items):
        role = "pair" if item.problem is None else "placeholder"
        rows.append(Row(item.token_ids, number, item.seed, role, item.key))
        if item.negative_ids is not None:
            negatives.append(Row(item.negative_ids, number, mix_words(item.seed, "negative row"), "negative"))
    batch = planner(images, rows + negatives)
    batch.keys = [item.key for item in items]
    batch.problems = [(item.key, item.problem) for item in items if item.problem is not None]
    return batch


def clean_caption(text: str, full_stop: bool) -> str:
    """``text`` with every run of white space as one blank and none at the ends; "" if no word is left.

    With ``full_stop`` trailing full stops are replaced by exactly one (specification 6.1, the released behaviour).
    """
    text = " ".join(text.split())
    if not full_stop:
        return text
    text = text.rstrip(". ")
    return f"{text}." if text else ""
