"""How decoded samples become a batch: caption cleaning, rows and their seeds, placeholders for unusable samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.batch import Batch, Planner, Row
from pipeline.order import mix_words


class Item(NamedTuple):
    """One sample, decoded.

    ``images`` are I tensors uint8 [3, S, S]; ``token_ids`` and ``negative_ids`` (another sample's caption, or None) are
    ``<s> .. </s>``. An unusable sample has its reason in ``problem``, no images, and ``<s></s>`` as tokens.
    """

    key: str
    seed: int
    images: Sequence[Tensor]
    token_ids: list[int]
    negative_ids: list[int] | None = None
    problem: str | None = None


def collate(items: Sequence[Item], planner: Planner, image_size: int, num_images: int = 1) -> Batch:
    """B items to a batch of B images (groups of ``num_images``) and R >= B rows: own captions first, then negatives.

    An unusable item keeps its slot: black image, row with role "placeholder", an entry in ``Batch.problems``.
    """
    images = torch.zeros((len(items), num_images, 3, image_size, image_size), dtype=torch.uint8)
    rows, negatives = [], []
    for number, item in enumerate(items):
        if item.problem is not None:
            rows.append(Row(item.token_ids, number, item.seed, "placeholder"))
            continue
        for slot, pixels in enumerate(item.images):
            images[number, slot].copy_(pixels)
        rows.append(Row(item.token_ids, number, item.seed, "pair"))
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
