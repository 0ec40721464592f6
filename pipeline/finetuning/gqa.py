"""The task of GQA: questions about images with one right answer each, scored by type of question."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pipeline.data.shard_reader import RawSample
from pipeline.finetuning.classification import entry
from pipeline.finetuning.vqa import VQA, Judged
from pipeline.metrics import gqa as metrics
from pipeline.metrics.submissions import gqa_submission
from pipeline.tasks.task import Prediction

TYPES = ("structural", "semantic")  # what a question asks: verify, query, choose, ...; of what: object, attribute, ...


def gqa() -> VQA:
    """GQA: an answer is right or wrong."""
    return VQA(Judged(about, summarise, "accuracy", metrics.PROTOCOL, results))


def about(sample: RawSample) -> dict[str, Any]:
    """What a prediction repeats of a question; raises ValueError where it has no id."""
    note = {"question_id": entry(sample, "question_id"), "question": sample.text}
    answers = entry(sample, "answers", optional=True)
    note |= {} if answers is None else {"answers": answers[:1]}  # which are all the same
    return note | {name: kind for name in TYPES if (kind := entry(sample, name, optional=True)) is not None}


def summarise(predictions: list[Prediction]) -> dict[str, float]:
    """Accuracy over the questions whose answer is known, and by type; each is told its "score"."""
    known = [one for one in predictions if one.get("answers")]
    if not known:
        return {}
    items = []
    for one in known:
        one["score"] = metrics.accuracy(one["answer"], one["answers"][0])
        types = {name: one[name] for name in TYPES if name in one}
        items.append(metrics.GQAItem(one["answer"], one["answers"][0], types, one["key"]))
    found = metrics.summarise(items)
    values = {"accuracy": found["accuracy"], "accuracy_as_written": found["as_written"], "questions": found["items"]}
    if found["standard_error"] is not None:
        values["accuracy_standard_error"] = found["standard_error"]
    by_type = found["by_type"].items()
    return values | {f"accuracy/{kind}/{name}": value for kind, of in by_type for name, value in of.items()}


def results(predictions: Sequence[Prediction], items: Iterable[RawSample]) -> list[dict[str, str]]:
    """What GQA's evaluator takes: a list of {"questionId", "prediction"}."""
    expected = [entry(item, "question_id") for item in items]
    return gqa_submission([(one["question_id"], one["answer"]) for one in predictions], expected)
