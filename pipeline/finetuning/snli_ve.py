"""The task SNLI-VE: does an image entail a hypothesis, contradict it, or neither? METER's recipe: section 7.5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from model.build import build_classification
from model.config import Vocabulary
from pipeline.config.options import Config
from pipeline.data.shard_reader import Corpus, RawSample
from pipeline.data.tokenizer import TextTokenizer
from pipeline.finetuning.classification import Label, classification_pass, entry, judged, named_label, text_preparation
from pipeline.loading.datasets import Preparation
from pipeline.tasks.task import EvaluationPass, EvaluationRanks, Score

LABELS = {"contradiction": 0, "neutral": 1, "entailment": 2}


class SNLIVE:
    """One of three classes for a hypothesis about an image; the premise is the image, no text."""

    num_images = 1
    texts = "hypotheses"

    def build(self, config: Config, vocabulary: Vocabulary) -> nn.Module:
        length = config.data.max_text_length
        return build_classification(config.model, config.objective, vocabulary, length, "snli_ve", len(LABELS))

    def preparation(self, config: Config, objective: nn.Module, tokenizer: TextTokenizer) -> Preparation:
        return text_preparation(config, objective, tokenizer, self.num_images, _label)

    def scores(self, objective: nn.Module) -> tuple[Score, ...]:
        return Score("accuracy", True), Score("loss", False)

    def passes(
        self,
        config: Config,
        objective: nn.Module,
        preparation: Preparation,
        held_out: Sequence[Corpus],
        ranks: EvaluationRanks,
    ) -> list[EvaluationPass]:
        return [classification_pass(config, preparation, held_out, ranks, _judge, lambda found: judged(found)[1])]

    def protocol(self, config: Config) -> dict[str, Any]:
        return {
            "accuracy": "share of hypotheses judged rightly",
            "labels": "those of the annotation files given; the corrected labels of e-SNLI-VE-2.0 differ in about 9 %",
        }


def _label(sample: RawSample) -> Label:
    return named_label(sample, LABELS, {"pair_id": entry(sample, "pair_id"), "hypothesis": sample.text})


def _judge(logits: Tensor, number: int) -> dict[str, Any]:
    probabilities = logits[number].softmax(0).tolist()
    names = list(LABELS)
    return {
        "prediction": names[int(logits[number].argmax())],
        "probabilities": dict(zip(names, probabilities, strict=True)),
    }
