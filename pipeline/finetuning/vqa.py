"""The task of visual question answering: a classifier over a list of answers, scored by VQA's evaluator.

Recipe and head: specification sections 6.3 and 7.1. Scores: ``pipeline/metrics/vqa.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from data_prep.vqa_answers import answers_hash, read_vocabulary, soft_scores
from model.build import build_captioning, build_classification
from model.config import Vocabulary
from pipeline.config.options import Config, ConfigError, weighted_paths
from pipeline.data.shard_reader import Corpus, RawSample
from pipeline.data.tokenizer import TextTokenizer
from pipeline.finetuning import written_answers as written
from pipeline.finetuning.classification import Label, classification_pass, entry, text_preparation
from pipeline.loading.datasets import Preparation
from pipeline.metrics import vqa as metrics
from pipeline.metrics.submissions import vqa_submission
from pipeline.tasks.task import EvaluationPass, EvaluationRanks, Prediction, Score

ANSWERS_NAME = "answers.json"


@dataclass(frozen=True)
class AnswerLabels:
    """Soft targets of a question from its ten answers, each looked up in ``classes``; None where none is in it.

    ``normalised``: answers are normalised as the evaluator does before they are looked up.
    # NOTE release: they are looked up as they stand, so that "Yes" and "two" are no votes; here: only if ``released``.
    """

    classes: Mapping[str, int]
    normalised: bool = True

    def __call__(self, sample: RawSample) -> Label:
        note = about(sample)
        scores = soft_scores(note.get("answers", ()), self.classes, self.normalised)
        return scores or None, note


def about(sample: RawSample) -> dict[str, Any]:
    """What a prediction repeats of a question; raises ValueError where it has no id."""
    note = {"question_id": entry(sample, "question_id"), "question": sample.text}
    for name in ("answers", "answer_type", "question_type"):
        value = entry(sample, name, optional=True)
        note |= {} if value is None else {name: value}
    return note


class VQA:
    """Answers to questions about an image, out of the list of the run or, with ``task.generative``, in own words."""

    num_images = 1
    texts = "questions"
    run_files = {ANSWERS_NAME: "task.answers"}  # of a classifier

    def build(self, config: Config, vocabulary: Vocabulary) -> nn.Module:
        if config.task.generative:
            return build_captioning(config.model, config.objective, vocabulary, config.data.max_text_length)
        config.task.answers = str(answers_file(config))  # for RUN/config.yaml, and for the copy in RUN
        classes = len(read_vocabulary(answers_file(config)))
        length = config.data.max_text_length
        return build_classification(config.model, config.objective, vocabulary, length, "vqa", classes, kind="soft")

    def preparation(self, config: Config, objective: nn.Module, tokenizer: TextTokenizer) -> Preparation:
        if config.task.generative:
            return written.preparation(config, objective, tokenizer, about)
        classes = {answer: number for number, answer in enumerate(read_vocabulary(answers_file(config)))}
        labels = AnswerLabels(classes, normalised=config.model.behaviour == "default")
        return text_preparation(config, objective, tokenizer, self.num_images, labels)

    def scores(self, objective: nn.Module) -> tuple[Score, ...]:
        return Score("vqa_accuracy", True), Score("loss", False)

    def passes(
        self,
        config: Config,
        objective: nn.Module,
        preparation: Preparation,
        held_out: Sequence[Corpus],
        ranks: EvaluationRanks,
    ) -> list[EvaluationPass]:
        if config.task.generative:
            return written.passes(config, objective, preparation, held_out, ranks, summarise)
        judge = partial(_judge, read_vocabulary(answers_file(config)))
        return [classification_pass(config, preparation, held_out, ranks, judge, summarise)]

    def fingerprint(self, config: Config) -> dict[str, Any]:
        """What the classes of a classifier mean."""
        if config.task.generative:
            return {}
        return {"answers": answers_hash(read_vocabulary(answers_file(config)))}

    def protocol(self, config: Config) -> dict[str, Any]:
        if config.task.generative:
            return metrics.PROTOCOL | {"answers": f"written, at most {config.task.max_answer_tokens} tokens, greedy"}
        answers = read_vocabulary(answers_file(config))
        return metrics.PROTOCOL | {"answers": f"one of {len(answers)} (sha256 {answers_hash(answers)[:12]})"}

    def submission(self, config: Config, predictions: Sequence[Prediction], items: Iterable[RawSample]) -> Any:
        """What EvalAI takes: a list of {"question_id", "answer"}."""
        expected = [entry(item, "question_id") for item in items]
        return vqa_submission([(one["question_id"], one["answer"]) for one in predictions], expected)


def _judge(answers: Sequence[str], logits: Tensor, number: int) -> dict[str, Any]:
    chosen = int(logits[number].argmax())
    return {"answer": answers[chosen], "confidence": float(logits[number, chosen].sigmoid())}


def summarise(predictions: list[Prediction]) -> dict[str, float]:
    """Accuracy over the questions whose answers are known, and by type of answer; each is told its "score"."""
    known = [one for one in predictions if "answers" in one]
    if not known:
        return {}
    for one in known:
        one["score"] = metrics.accuracy(one["answer"], one["answers"])
    found = metrics.summarise(
        metrics.VQAItem(one["answer"], one["answers"], one.get("answer_type"), image=one["key"]) for one in known
    )
    values = {"vqa_accuracy": found["vqa_accuracy"], "questions": found["items"]}
    if found["standard_error"] is not None:
        values["vqa_accuracy_standard_error"] = found["standard_error"]
    return values | {f"vqa_accuracy/{kind}": of["accuracy"] for kind, of in found["by_answer_type"].items()}


def answers_file(config: Config) -> Path:
    """The list of answers of a run: ``task.answers``, or answers.json in or above the first data path."""
    if config.task.answers:
        return Path(config.task.answers)
    first = weighted_paths(config.data)[0][0]
    for folder in (first, first.resolve().parent, first.resolve().parent.parent):
        if (folder / ANSWERS_NAME).is_file():
            return folder / ANSWERS_NAME
    raise ConfigError(
        f"{first / ANSWERS_NAME}: no such file; `python -m data_prep vqav2` writes it beside the data, or name one by "
        "--task.answers FILE"
    )
