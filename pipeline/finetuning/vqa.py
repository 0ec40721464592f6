"""The tasks of visual question answering: an answer out of a list, or in words; VQA's own and what others share.

Recipe and head: specification sections 6.3 and 7.1. Scores of VQA: ``pipeline/metrics/vqa.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from data_prep.stores.local_copies import fetch_small_files
from data_prep.vqa_answers import answers_hash, read_vocabulary, soft_scores
from model.build import build_captioning, build_classification, build_objective
from model.config import Vocabulary
from pipeline.config.options import Config, ConfigError, reads_by_language_model, weighted_paths
from pipeline.data.shard_reader import Corpus, RawSample
from pipeline.data.tokenizer import TextTokenizer
from pipeline.finetuning.classification import Label, classification_pass, entry, text_preparation
from pipeline.loading.datasets import Preparation
from pipeline.metrics import vqa as metrics
from pipeline.metrics.submissions import vqa_submission
from pipeline.tasks import written_answers as written
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
    about: Callable[[RawSample], dict[str, Any]] | None = None  # what predictions repeat, here as in VQA

    def __call__(self, sample: RawSample) -> Label:
        note = (self.about or about)(sample)
        answers = entry(sample, "answers", optional=True) or ()
        scores = soft_scores(answers, self.classes, self.normalised)
        return scores or None, note


def about(sample: RawSample) -> dict[str, Any]:
    """What a prediction repeats of a question; raises ValueError where it has no id."""
    note = {"question_id": entry(sample, "question_id"), "question": sample.text}
    for name in ("answers", "answer_type", "question_type"):
        value = entry(sample, name, optional=True)
        note |= {} if value is None else {name: value}
    return note


class Judged(NamedTuple):
    """What the sets of questions differ in: what predictions repeat of a question, how answers are scored, by which of
    the scores checkpoints are compared, what the evaluator is, and the official results file."""

    about: Callable[[RawSample], dict[str, Any]]
    summarise: Callable[[list[Prediction]], dict[str, float]]
    score: str
    protocol: Mapping[str, Any]
    submission: Callable[[Sequence[Prediction], Iterable[RawSample]], Any]


class VQA:
    """Answers to questions about an image, out of the list of the run or, with ``task.generative``, in own words.

    The answer is one of ``task.answers``, whose vocabulary every set's own verb of `python -m data_prep` writes.
    """

    num_images = 1
    texts = "questions"
    run_files = {ANSWERS_NAME: "task.answers"}  # of a classifier

    def __init__(self, judged: Judged | None = None) -> None:
        """``judged``: as what; None: as VQA."""
        self._judged = judged or JUDGED

    def build(self, config: Config, vocabulary: Vocabulary) -> nn.Module:
        length = config.data.max_text_length
        if reads_by_language_model(config):
            return build_objective(config.model, config.objective, vocabulary, length)
        if config.task.generative:
            return build_captioning(config.model, config.objective, vocabulary, length)
        _refuse_idle(config)
        config.task.answers = str(answers_file(config))  # for RUN/config.yaml, and for the copy in RUN
        classes = len(read_vocabulary(answers_file(config)))
        return build_classification(config.model, config.objective, vocabulary, length, "vqa", classes, kind="soft")

    def preparation(self, config: Config, objective: nn.Module, tokenizer: TextTokenizer) -> Preparation:
        if written.writes_answers(config):
            return written.preparation(config, objective, tokenizer, self._judged.about)
        classes = {answer: number for number, answer in enumerate(read_vocabulary(answers_file(config)))}
        labels = AnswerLabels(classes, config.model.behaviour == "default", self._judged.about)
        return text_preparation(config, objective, tokenizer, self.num_images, labels)

    def scores(self, objective: nn.Module) -> tuple[Score, ...]:
        return Score(self._judged.score, True), Score("loss", False)

    def passes(
        self,
        config: Config,
        objective: nn.Module,
        preparation: Preparation,
        held_out: Sequence[Corpus],
        ranks: EvaluationRanks,
    ) -> list[EvaluationPass]:
        summarise = self._judged.summarise
        if written.writes_answers(config):
            return written.passes(config, objective, preparation, held_out, ranks, summarise)
        judge = partial(_judge, read_vocabulary(answers_file(config)))
        return [classification_pass(config, preparation, held_out, ranks, judge, summarise)]

    def fingerprint(self, config: Config) -> dict[str, Any]:
        """What the classes of a classifier mean."""
        if written.writes_answers(config):
            return {}
        return {"answers": answers_hash(read_vocabulary(answers_file(config)))}

    def protocol(self, config: Config) -> dict[str, Any]:
        if written.writes_answers(config):
            return {**self._judged.protocol, **written.protocol(config)}
        answers = read_vocabulary(answers_file(config))
        return {
            **self._judged.protocol,
            "answers": f"one of {len(answers)} (sha256 {answers_hash(answers)[:12]})",
        }

    def submission(self, config: Config, predictions: Sequence[Prediction], items: Iterable[RawSample]) -> Any:
        """The official results file of the set."""
        return self._judged.submission(predictions, items)


def evalai_answers(predictions: Sequence[Prediction], items: Iterable[RawSample]) -> list[dict[str, Any]]:
    """What EvalAI takes: a list of {"question_id", "answer"}."""
    expected = [entry(item, "question_id") for item in items]
    return vqa_submission([(one["question_id"], one["answer"]) for one in predictions], expected)


def _judge(answers: Sequence[str], logits: Tensor, number: int) -> dict[str, Any]:
    chosen = int(logits[number].argmax())
    return {"answer": answers[chosen], "confidence": float(logits[number, chosen].sigmoid())}


def summarise(predictions: list[Prediction], by: str = "answer_type") -> dict[str, float]:
    """Accuracy over the questions whose answers are known, and ``by`` type of answer, or of question ("question_type");
    each is told its "score"."""
    known = [one for one in predictions if "answers" in one]
    if not known:
        return {}
    for one in known:
        one["score"] = metrics.accuracy(one["answer"], one["answers"])
    found = metrics.summarise(
        metrics.VQAItem(one["answer"], one["answers"], one.get("answer_type"), one.get("question_type"), one["key"])
        for one in known
    )
    values = {"vqa_accuracy": found["vqa_accuracy"], "questions": found["items"]}
    if found["standard_error"] is not None:
        values["vqa_accuracy_standard_error"] = found["standard_error"]
    return values | {f"vqa_accuracy/{kind}": of["accuracy"] for kind, of in found[f"by_{by}"].items()}


JUDGED = Judged(about, summarise, "vqa_accuracy", metrics.PROTOCOL, evalai_answers)


def _refuse_idle(config: Config) -> None:
    """Raises ConfigError for an option of written answers where one is chosen from a list."""
    for name in ("question_prompt", "decoding"):
        value = getattr(config.task, name)
        if value != getattr(type(config.task)(), name):
            raise ConfigError(
                f"task.{name} {value!r} has no effect where answers are chosen from a list; use --task.generative true"
            )


def answers_file(config: Config) -> Path:
    """The list of answers of a run: ``task.answers``, or answers.json in or above the first data path."""
    if config.task.answers:
        return Path(config.task.answers)
    first = weighted_paths(config.data)[0][0]
    for folder in (first, first.resolve().parent, first.resolve().parent.parent):
        if (folder / ANSWERS_NAME).is_file():
            there = isinstance(folder, Path)
            return (folder if there else fetch_small_files(folder, [ANSWERS_NAME])) / ANSWERS_NAME
    raise ConfigError(
        f"{first / ANSWERS_NAME}: no such file; `python -m data_prep vqav2` writes it beside the data, or name one by "
        "--task.answers FILE"
    )
