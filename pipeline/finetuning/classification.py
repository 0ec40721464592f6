"""What the tasks share that choose one of several classes for a text about its images: rows, losses, predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from model.batch import Batch, Row
from pipeline.config.options import Config
from pipeline.data.shard_reader import Corpus, RawSample
from pipeline.data.tokenizer import TextTokenizer, clean_caption
from pipeline.data.transforms import UnusableSample
from pipeline.loading.datasets import OtherRows, Preparation
from pipeline.loading.open_data import eval_loader, placeholder_batch
from pipeline.metrics.statistics import standard_error
from pipeline.tasks.task import EvaluationPass, EvaluationRanks, Measurement, Prediction

Label = tuple[Any, dict[str, Any]]  # the target of a sample's text (None: not known), and what predictions repeat


@dataclass(frozen=True)
class TextRows:
    """One row that is read for each image of a sample, all with the sample's text.

    ``label`` gives target and note; it raises ValueError, with a few words that count as the reason, for a sample
    whose metadata do not hold what the task needs.
    """

    tokenizer: TextTokenizer
    max_text_length: int
    num_images: int
    label: Callable[[RawSample], Label]

    def rows(self, sample: RawSample, seed: int, others: OtherRows) -> list[Row]:
        text = clean_caption(sample.text, full_stop=False)
        if not text:
            raise UnusableSample(sample.key, "empty text")
        try:
            target, note = self.label(sample)
        except ValueError as error:
            raise UnusableSample(sample.key, str(error)) from None
        ids = self.tokenizer.encode(text, self.max_text_length)
        return [Row(ids, image, seed, "read", sample.key, target, note) for image in range(self.num_images)]

    def placeholder(self, key: str) -> list[Row]:
        vocabulary = self.tokenizer.vocabulary
        return [Row([vocabulary.bos_id, vocabulary.eos_id], 0, 0, "placeholder", key)]


def entry(sample: RawSample, name: str, optional: bool = False) -> Any:
    """What the metadata list ``name`` holds for the sample's text; None where an ``optional`` list is not there.

    Raises:
        ValueError: there is no such list, or it has no such entry.
    """
    values = sample.meta.get(name)
    if values is None and optional:
        return None
    if not isinstance(values, list) or sample.number >= len(values):
        raise ValueError(f"no {name.replace('_', ' ')}")
    return values[sample.number]


def text_preparation(
    config: Config,
    objective: nn.Module,
    tokenizer: TextTokenizer,
    num_images: int,
    label: Callable[[RawSample], Label],
) -> Preparation:
    """How samples of a text and its images become a batch of a ``Classification``."""
    maker = TextRows(tokenizer, config.data.max_text_length, num_images, label)
    return Preparation(maker, objective.planner, config.model.vision.image_size)


def named_label(sample: RawSample, classes: Mapping[str, int], note: dict[str, Any]) -> Label:
    """Target and note of a text whose metadata list "label" names one of ``classes``; a test split has no such list.

    Raises:
        ValueError: the label is none of them.
    """
    label = entry(sample, "label", optional=True)
    if label is None:
        return None, note
    if label not in list(classes):  # in a list, for what can't be hashed
        raise ValueError(f"label is none of {', '.join(classes)}")
    return classes[label], note | {"label": label}


def classification_pass(
    config: Config,
    preparation: Preparation,
    held_out: Sequence[Corpus],
    ranks: EvaluationRanks,
    judge: Callable[[Tensor, int], dict[str, Any]],
    summarise: Callable[[list[Prediction]], dict[str, float]],
) -> EvaluationPass:
    """Every text of the corpora once: its loss where the target is known, and a prediction.

    ``judge`` turns the logits fp32 [M, C] on the host and the number of one text into what its prediction says;
    ``summarise`` turns all predictions into values by name.
    """
    maker = preparation.maker
    return EvaluationPass(
        eval_loader(config, list(held_out), preparation, ranks.place, ranks.pin, config.task.images),
        placeholder_batch(preparation, maker.num_images),
        partial(_measure, judge),
        ("loss", "targets"),
        partial(_values, summarise),
    )


def _measure(judge: Callable[[Tensor, int], dict[str, Any]], objective: nn.Module, batch: Batch) -> Measurement:
    logits, sums = objective.judge(batch)
    samples, logits = objective.samples(batch).tolist(), logits.cpu()
    predictions = [
        {"position": batch.positions[sample], "key": batch.keys[sample], **batch.notes[sample], **judge(logits, number)}
        for number, sample in enumerate(samples)
        if batch.positions  # a placeholder has none
    ]
    loss, _ = sums[objective.term]
    return Measurement({"loss": loss, "targets": batch.counts[objective.term]}, predictions)


def _values(
    summarise: Callable[[list[Prediction]], dict[str, float]],
    totals: Mapping[str, float],
    predictions: list[Prediction],
) -> dict[str, float]:
    loss = {"loss": totals["loss"] / totals["targets"]} if totals["targets"] else {}
    return loss | summarise(predictions)


def judged(predictions: list[Prediction]) -> tuple[list[Prediction], dict[str, float]]:
    """The predictions whose "label" is known, each told whether it is "correct", and their accuracy.

    Its standard error takes the texts of an image, or pair, together.
    """
    known = [one for one in predictions if "label" in one]
    for one in known:
        one["correct"] = one["prediction"] == one["label"]
    if not known:
        return [], {}
    correct = [one["correct"] for one in known]
    error = standard_error(correct, [one["key"] for one in known])
    values = {"accuracy": sum(correct) / len(correct), "texts": len(correct)}
    return known, values | ({} if error is None else {"accuracy_standard_error": error})
