"""Scores captions by what can be checked without a reference implementation: equality, and the main object named."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

Scored = tuple[str, Sequence[str], Mapping[str, Any]]  # caption, references, metadata of the sample


def summarise(captions: Sequence[Scored]) -> dict[str, Any]:
    """Number of captions, share equal to a reference and, where samples say what the main object is, share naming it.

    A caption names the main object when, of all main colours and main shapes that occur in ``captions``, those it
    mentions first are the sample's own.
    """
    result: dict[str, Any] = {"captions": len(captions)}
    if not captions:
        return result
    exact = sum(normalise(caption) in {normalise(reference) for reference in refs} for caption, refs, _ in captions)
    result["exact_match"] = exact / len(captions)
    known = [(caption, meta) for caption, _, meta in captions if meta.get("main_colour") and meta.get("main_shape")]
    if known:
        colours, shapes = ({meta[name] for _, meta in known} for name in ("main_colour", "main_shape"))
        right = sum(
            first_mention(caption, colours) == meta["main_colour"]
            and first_mention(caption, shapes) == meta["main_shape"]
            for caption, meta in known
        )
        result["main_colour_and_shape_share"] = right / len(known)
    return result


def normalise(caption: str) -> str:
    """Lower case, single spaces, no full stop at the end."""
    return " ".join(caption.lower().split()).rstrip(". ")


def first_mention(caption: str, words: set[str]) -> str | None:
    """The first word of a caption that is one of ``words``."""
    return next((word for word in re.findall(r"[^\W\d_]+", caption.lower()) if word in words), None)
