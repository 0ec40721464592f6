"""Recall of retrieval: how often an image finds a caption of its own, and a caption its image, among the first k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.metrics.statistics import standard_error

KS = (1, 5, 10)
_CELLS_AT_A_TIME = 1 << 24


@dataclass(frozen=True)
class Ranks:
    """The place (0 is best) of the right answer: ``text`` int64 [N] of each image's best own caption among the captions
    of other images, ``image`` int64 [M] of each caption's image among the images. Ties count against the right one."""

    text: np.ndarray
    image: np.ndarray


def ranks(scores: np.ndarray, image_of_caption: Sequence[int] | np.ndarray) -> Ranks:
    """Ranks from ``scores`` [N, M] of N images and M captions, float of any precision, also a memory map.

    ``image_of_caption`` [M] names each caption's image. Rows are looked at in pieces, each of them twice. A wrong
    answer with the score of the right one ranks before it, so that a model that gives all pairs one score finds
    nothing. Raises ValueError for another shape, an image without captions, and a score that is NaN.
    """
    owners = np.asarray(image_of_caption)
    if scores.ndim != 2 or scores.shape[1:] != owners.shape or not np.issubdtype(owners.dtype, np.integer):
        raise ValueError(f"scores {scores.shape}, images of captions {owners.shape}: expected [N, M] and M integers")
    num_images, num_captions = scores.shape
    missing = np.flatnonzero(np.bincount(owners.clip(0, num_images), minlength=num_images)[:num_images] == 0)
    if num_captions == 0 or owners.min() < 0 or owners.max() >= num_images:
        raise ValueError(f"captions of images {_span(owners)}: expected 0..{num_images - 1}, at least one caption")
    if missing.size:
        raise ValueError(f"image {missing[0]} has no caption (nor have {missing.size - 1} others): leave it out")
    own_score = np.asarray(scores[owners, np.arange(num_captions)])
    text = np.empty(num_images, dtype=np.int64)
    image = np.full(num_captions, -1, dtype=np.int64)  # the right image is counted below, too
    step = max(1, _CELLS_AT_A_TIME // num_captions)
    for start in range(0, num_images, step):
        rows = np.asarray(scores[start : start + step])
        if np.isnan(rows).any():
            row, column = np.argwhere(np.isnan(rows))[0]
            raise ValueError(f"the score of image {start + row} and caption {column} is NaN: no rank can be given")
        own = owners[None] == np.arange(start, start + len(rows))[:, None]
        best = np.where(own, rows, -np.inf).max(axis=1, keepdims=True)
        text[start : start + step] = ((rows >= best) & ~own).sum(axis=1)
        image += (rows >= own_score).sum(axis=0)
    return Ranks(text, image)


def recalls(
    scores: np.ndarray, image_of_caption: Sequence[int] | np.ndarray, ks: Sequence[int] = KS
) -> dict[str, float]:
    """``tr_at_K`` (image to text) and ``ir_at_K`` (text to image) for each K, 0 to 1, and their mean ``mean_recall``.

    Raises ValueError like ``ranks``.
    """
    return summarise(ranks(scores, image_of_caption), ks)


def summarise(found: Ranks, ks: Sequence[int] = KS) -> dict[str, float]:
    """The recalls of ``ranks``, and ``tr_median_rank`` and ``ir_median_rank`` (1 is best)."""
    sides = {"tr": found.text, "ir": found.image}
    values = {f"{side}_at_{k}": float((places < k).mean()) for side, places in sides.items() for k in ks}
    values["mean_recall"] = sum(values.values()) / len(values)
    return values | {f"{side}_median_rank": float(np.median(places)) + 1 for side, places in sides.items()}


def standard_errors(
    found: Ranks, image_of_caption: Sequence[int] | np.ndarray, ks: Sequence[int] = KS
) -> dict[str, float | None]:
    """Of each recall; captions of one image depend on each other and count as one group."""
    owners = np.asarray(image_of_caption).tolist()
    errors = {f"tr_at_{k}": standard_error(found.text < k) for k in ks}
    return errors | {f"ir_at_{k}": standard_error(found.image < k, owners) for k in ks}


def _span(owners: np.ndarray) -> str:
    return f"{owners.min()}..{owners.max()}" if owners.size else "none"
