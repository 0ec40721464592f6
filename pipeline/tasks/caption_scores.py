"""Scores captions: by CIDEr-D against free text, by equality and the main object where a grammar wrote the texts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.metrics.captions import IN_LOOP, caption_scores

Scored = tuple[str, Sequence[str], Mapping[str, Any]]  # caption, references, metadata of the sample
_DRAWN = ("main_colour", "main_shape")  # metadata that the synthetic corpora, whose captions a grammar writes, give


class Summary(NamedTuple):
    """``values`` by name; ``protocol`` says what makes them comparable, "" where nothing needs to be said;
    ``per_caption`` is the CIDEr-D of each caption, None of a grammar's."""

    values: dict[str, Any]
    protocol: str
    per_caption: list[float | None]


def summarise(captions: Sequence[Scored]) -> Summary:
    """The number of captions and their scores by the kind of their references, which the samples' metadata tell.

    Of free text: ``cider_d`` (0 to 10) by the document frequencies of these references, with its standard error. Where
    the metadata say what the main object is, a grammar wrote the references: then ``exact_match``, the share equal to
    one of them, and ``main_colour_and_shape_share``, the share that names the main object: of all main colours and
    shapes that occur in ``captions``, those it mentions first are the sample's own.
    """
    values: dict[str, Any] = {"captions": len(captions)}
    per_caption: list[float | None] = [None] * len(captions)
    drawn = [one for one in captions if is_drawn(one[2])]
    free = [number for number, one in enumerate(captions) if not is_drawn(one[2])]
    protocol = ""
    if free:
        predictions = {number: captions[number][0] for number in free}
        found = caption_scores(predictions, {number: list(captions[number][1]) for number in free}, IN_LOOP)
        values["cider_d"], values["cider_d_standard_error"] = found.values["cider_d"], found.standard_errors["cider_d"]
        for number, value in found.per_item["cider_d"].items():
            per_caption[number] = value
        protocol = f"{'; '.join(found.notes)}; tokenization: {found.tokenization}"
    if drawn:
        values["exact_match"] = exact_share(drawn)
        colours, shapes = ({meta[name] for _, _, meta in drawn} for name in _DRAWN)
        right = sum(
            first_mention(caption, colours) == meta["main_colour"]
            and first_mention(caption, shapes) == meta["main_shape"]
            for caption, _, meta in drawn
        )
        values["main_colour_and_shape_share"] = right / len(drawn)
    return Summary(values, protocol, per_caption)


def is_drawn(meta: Mapping[str, Any]) -> bool:
    """Whether a sample is one of the synthetic corpora."""
    return all(meta.get(name) for name in _DRAWN)


def exact_share(captions: Sequence[Scored]) -> float:
    """The share of at least one caption that equal a reference, but for case, spaces and a full stop."""
    equal = (normalise(caption) in map(normalise, references) for caption, references, _ in captions)
    return sum(equal) / len(captions)


def in_words(name: str, value: Any) -> str:
    """A value of a summary for people: shares as percentages, CIDEr-D as it is."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3f}" if name.startswith("cider_d") else f"{100 * value:.1f} %"


def normalise(caption: str) -> str:
    """Lower case, single spaces, no full stop at the end."""
    return " ".join(caption.lower().split()).rstrip(". ")


def first_mention(caption: str, words: set[str]) -> str | None:
    """The first word of a caption that is one of ``words``."""
    return next((word for word in re.findall(r"[^\W\d_]+", caption.lower()) if word in words), None)
