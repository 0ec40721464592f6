"""The task NLVR2: is a statement about two images, or another number, true? Head: specification section 7.2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from model.build import build_classification
from model.config import Vocabulary
from pipeline.config.options import Config
from pipeline.data.shard_reader import Corpus, RawSample
from pipeline.data.tokenizer import TextTokenizer
from pipeline.finetuning.classification import Label, classification_pass, entry, judged, named_label, text_preparation
from pipeline.loading.datasets import Preparation
from pipeline.metrics.consistency import consistency
from pipeline.tasks.task import EvaluationPass, EvaluationRanks, Prediction, Score

LABELS = {"False": 0, "True": 1}  # strings in the annotations, and every non-empty string is true in Python


@dataclass(frozen=True)
class NLVR2:
    """True or false, from the CLS features of the statement with each of its images."""

    num_images: int = 2

    def build(self, config: Config, vocabulary: Vocabulary) -> nn.Module:
        length, images = config.data.max_text_length, self.num_images
        return build_classification(config.model, config.objective, vocabulary, length, "nlvr2", len(LABELS), images)

    def preparation(self, config: Config, objective: nn.Module, tokenizer: TextTokenizer) -> Preparation:
        return text_preparation(config, objective, tokenizer, self.num_images, _label)

    def scores(self, objective: nn.Module) -> tuple[Score, ...]:
        return Score("accuracy", True), Score("loss", False), Score("consistency", True)

    def passes(
        self,
        config: Config,
        objective: nn.Module,
        preparation: Preparation,
        held_out: Sequence[Corpus],
        ranks: EvaluationRanks,
    ) -> list[EvaluationPass]:
        return [classification_pass(config, preparation, held_out, ranks, _judge, _summarise)]

    def protocol(self, config: Config) -> dict[str, Any]:
        return {
            "accuracy": "share of statements judged rightly",
            "consistency": "share of sentences judged rightly with all their image pairs",
        }


def _label(sample: RawSample) -> Label:
    return named_label(sample, LABELS, {"identifier": entry(sample, "identifier"), "sentence": sample.text})


def _judge(logits: Tensor, number: int) -> dict[str, Any]:
    names, row = list(LABELS), logits[number]
    return {"prediction": names[int(row.argmax())], "probability": float(row.softmax(0)[LABELS["True"]])}


def _summarise(predictions: list[Prediction]) -> dict[str, float]:
    known, values = judged(predictions)
    if known:
        right = consistency([one["identifier"] for one in known], [one["correct"] for one in known])
        values |= {"consistency": sum(right.values()) / len(right), "sentences": len(right)}
    return values
