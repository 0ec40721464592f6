"""What is taken for what: counts of predictions by truth and by type, and recall over k, for the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.metrics.recall import Ranks

MOST_ANSWERS = 8  # of a matrix, then "other answers"
OTHER = "other answers"
CURVE = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100)


def matrix(title: str, pairs: Sequence[tuple[str, str]], names: Sequence[str] | None = None) -> dict[str, Any]:
    """Counts of (truth, prediction) with a row per truth: of the ``names``, or of the most frequent and all others."""
    if names is None:
        common = Counter(name for pair in pairs for name in pair).most_common()
        names = [name for name, _ in sorted(common, key=lambda one: (-one[1], one[0]))[:MOST_ANSWERS]]
    known = [*names, *([OTHER] if any(name not in names for pair in pairs for name in pair) else [])]
    place = {name: number for number, name in enumerate(known)}
    counts = [[0] * len(known) for _ in known]
    for truth, predicted in pairs:
        counts[place.get(truth, len(known) - 1)][place.get(predicted, len(known) - 1)] += 1
    if known and known[-1] == OTHER:
        counts[-1][-1] = None  # different answers may meet there, right or wrong
    return {"title": title, "names": known, "counts": counts}


def of_answers(predictions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of VQA: items and accuracy by type of answer, and for each type what the commonest answers are taken for.

    The truth of a question is the answer that most of its people gave, of equally many the one that comes first.
    """
    by_type: dict[str, list[Mapping[str, Any]]] = {}
    for one in predictions:
        if one.get("answers"):
            by_type.setdefault(str(one.get("answer_type") or "all"), []).append(one)
    types = [
        {"type": kind, "items": len(found), "accuracy": float(np.mean([one["score"] for one in found]))}
        for kind, found in sorted(by_type.items())
    ]
    confusion = [
        matrix(f"Answers of type {kind}", [(common_answer(one), one["answer"]) for one in found])
        for kind, found in sorted(by_type.items())
    ]
    return {"types": types, "confusion": confusion}


def common_answer(prediction: Mapping[str, Any]) -> str:
    """The answer that most people gave."""
    return Counter(prediction["answers"]).most_common(1)[0][0]


def of_labels(predictions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of NLVR2 and SNLI-VE: labels by predictions."""
    known = [(one["label"], one["prediction"]) for one in predictions if "label" in one]
    names = sorted({name for pair in known for name in pair})
    return {"confusion": [matrix("Labels", known, names)] if known else []}


def recall_curves(found: Ranks) -> dict[str, Any]:
    """Recall at each k of ``CURVE`` below the number of candidates, both directions."""
    candidates = {"image to text": found.text, "text to image": found.image}
    ks = [k for k in CURVE if k < max(len(found.text), 2)]
    return {"k": ks} | {name: [float((places < k).mean()) for k in ks] for name, places in candidates.items()}
