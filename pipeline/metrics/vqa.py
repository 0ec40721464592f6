"""The accuracy of VQA as its evaluator defines it, of one question and of all, by type of answer and of question."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.vqa_answers import EVALUATOR, normalise, trimmed
from pipeline.metrics.statistics import standard_error

FULL = 3  # matching answers that make an answer entirely right
PROTOCOL = {
    "evaluator": EVALUATOR,
    "accuracy": "mean over the ten answers of min(matches among the other nine / 3, 1)",
    "normalisation": "prediction and references; neither where all references of a question are the same",
}


@dataclass(frozen=True)
class VQAItem:
    """One answered question. ``image`` groups questions for the standard error; None: a group of its own."""

    prediction: str
    answers: Sequence[str]
    answer_type: str | None = None
    question_type: str | None = None
    image: Hashable = None


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """The accuracy (0 to 1) of an answer to one question with the references ``answers``, ten in VQA.

    Each reference in turn is left out, by its place: equal ones stay. References that are all the same, and then the
    prediction too, are compared as they stand but for white space, so "Yes." does not match ten times "yes" (the
    evaluator's author calls it intended, VQA issue 14). Raises ValueError for fewer than 4 answers, with which even
    the right one could not reach 1.
    """
    if isinstance(answers, str) or len(answers) <= FULL:
        raise ValueError(f"answers {answers!r}: expected ten for each question, at least {FULL + 1}")
    clean: Callable[[str], str] = normalise if len({trimmed(answer) for answer in answers}) > 1 else trimmed
    wanted = clean(prediction)
    hits = [clean(answer) == wanted for answer in answers]
    return sum(min(1.0, (sum(hits) - hit) / FULL) for hit in hits) / len(hits)


def summarise(items: Iterable[VQAItem]) -> dict[str, Any]:
    """``vqa_accuracy`` (0 to 1) and its ``standard_error``, both also ``by_answer_type`` and ``by_question_type``.

    ``official`` holds what the evaluator prints: percent, rounded to two decimals after all is averaged. The values do
    not depend on the order of the items but for the last bits. Raises ValueError without items.
    """
    rows = [(item, accuracy(item.prediction, item.answers)) for item in items]
    if not rows:
        raise ValueError("no answered questions to score")
    whole = _group(rows)
    result = {"vqa_accuracy": whole["accuracy"], "standard_error": whole["standard_error"], "items": len(rows)}
    official: dict[str, Any] = {"overall": _percent(whole)}
    for name, key in (("answer_type", "perAnswerType"), ("question_type", "perQuestionType")):
        groups: dict[str, list[tuple[VQAItem, float]]] = {}
        for item, score in rows:
            if (kind := getattr(item, name)) is not None:
                groups.setdefault(kind, []).append((item, score))
        found = {kind: _group(groups[kind]) for kind in sorted(groups)}
        result[f"by_{name}"] = found
        official[key] = {kind: _percent(group) for kind, group in found.items()}
    return result | {"official": official}


def _group(rows: Sequence[tuple[VQAItem, float]]) -> dict[str, Any]:
    scores = [score for _, score in rows]
    images = [("place", place) if item.image is None else ("image", item.image) for place, (item, _) in enumerate(rows)]
    return {"accuracy": sum(scores) / len(scores), "standard_error": standard_error(scores, images), "items": len(rows)}


def _percent(group: dict[str, Any]) -> float:
    return round(100 * group["accuracy"], 2)
