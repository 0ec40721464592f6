"""Accuracy on GQA: whether an answer is the question's own, of all questions and by their types."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

from data_prep.vqa_answers import EVALUATOR, normalise, trimmed
from pipeline.metrics.statistics import standard_error

PROTOCOL = {
    "evaluator": "GQA: the answer itself",
    "normalisation": f"of the prediction only, by {EVALUATOR}, as BLIP-2 and EVLGen do; accuracy_as_written: of none",
}


@dataclass(frozen=True)
class GQAItem:
    """One answered question. ``types`` by kind ("structural", "semantic"); ``image`` groups questions for the standard
    error, None: a group of its own."""

    prediction: str
    answer: str
    types: dict[str, str] = field(default_factory=dict)
    image: Hashable = None


def accuracy(prediction: str, answer: str) -> float:
    """1 or 0: whether the prediction, as VQA's evaluator normalises it, is the ``answer`` as it stands.

    So an answer that the evaluator would change ("t-shirt") is never hit.
    """
    return float(normalise(prediction) == answer)


def accuracy_as_written(prediction: str, answer: str) -> float:
    """1 or 0 as GQA's own evaluator counts: whether both are the same, but for white space at the ends."""
    return float(trimmed(prediction) == answer)


def summarise(items: Iterable[GQAItem]) -> dict[str, Any]:
    """``accuracy`` (0 to 1), its ``standard_error``, ``as_written``, and ``by_type``: kind -> type -> accuracy.

    Raises ValueError without items.
    """
    items = list(items)
    if not items:
        raise ValueError("no answered questions to score")
    scores = [accuracy(item.prediction, item.answer) for item in items]
    images = [("place", place) if item.image is None else ("image", item.image) for place, item in enumerate(items)]
    groups: dict[str, dict[str, list[float]]] = {}
    for item, score in zip(items, scores, strict=True):
        for kind, name in item.types.items():
            groups.setdefault(kind, {}).setdefault(name, []).append(score)
    return {
        "accuracy": _mean(scores),
        "standard_error": standard_error(scores, images),
        "as_written": _mean([accuracy_as_written(item.prediction, item.answer) for item in items]),
        "by_type": {kind: {name: _mean(of[name]) for name in sorted(of)} for kind, of in sorted(groups.items())},
        "items": len(items),
    }


def _mean(scores: list[float]) -> float:
    return sum(scores) / len(scores)
