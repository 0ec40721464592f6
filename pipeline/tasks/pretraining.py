"""The task of pretraining: captions under one of the objectives; losses with the own image and with another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from model.batch import Batch
from model.build import build_objective
from model.config import Vocabulary
from pipeline.config.options import Config, reads_by_language_model
from pipeline.data.shard_reader import Corpus
from pipeline.data.tokenizer import TextTokenizer
from pipeline.loading.datasets import Preparation
from pipeline.loading.open_data import eval_loader, placeholder_batch
from pipeline.tasks.caption_rows import CaptionRows
from pipeline.tasks.language_rows import LanguageRows
from pipeline.tasks.task import EvaluationPass, EvaluationRanks, Measurement, Score

SHUFFLED = "shuffled/"  # before the names of values measured with other samples' images
MEASURED = ("loss", "correct", "targets")  # of every term


class Pretraining:
    """FLM, MLM, AR, PrefixLM or EVLGen on image-caption pairs."""

    num_images = 1

    def build(self, config: Config, vocabulary: Vocabulary) -> nn.Module:
        return build_objective(config.model, config.objective, vocabulary, config.data.max_text_length)

    def preparation(self, config: Config, objective: nn.Module, tokenizer: TextTokenizer) -> Preparation:
        planner, image_size = objective.planner, config.model.vision.image_size
        if reads_by_language_model(config):
            return Preparation(
                LanguageRows(tokenizer, objective.net.form, config.data.max_text_length), planner, image_size
            )
        maker = CaptionRows(tokenizer, config.data.max_text_length, planner.negative_share, planner.full_stop)
        return Preparation(maker, planner, image_size)

    def scores(self, objective: nn.Module) -> tuple[Score, ...]:
        names = sorted(objective.term_weights)
        each = [(Score(f"{name}_loss", False), Score(f"{name}_accuracy", True)) for name in names]
        return (Score("loss", False), *(score for pair in each for score in pair))

    def passes(
        self,
        config: Config,
        objective: nn.Module,
        preparation: Preparation,
        held_out: Sequence[Corpus],
        ranks: EvaluationRanks,
    ) -> list[EvaluationPass]:
        """With the own image, then with another sample's: there, what the image tells is lost.

        A match of text and image means nothing with another image, so the second pass has the terms of words alone.
        """
        placeholder = placeholder_batch(preparation)
        of_pairs = {name for name, term in placeholder.terms.items() if term.kind != "token"}
        weights = objective.term_weights
        of_language = {name: weight for name, weight in weights.items() if name not in of_pairs}
        return [
            held_out_pass(
                eval_loader(config, list(held_out), preparation, ranks.place, ranks.pin, images),
                placeholder,
                kept,
                name,
            )
            for name, images, kept in (("", "own", weights), (SHUFFLED, "shuffled", of_language))
        ]


def held_out_pass(
    batches: Any, placeholder: Batch, term_weights: Mapping[str, float], name: str = ""
) -> EvaluationPass:
    """Means of loss and accuracy of the terms over all targets, whatever the number of ranks."""
    names = sorted(term_weights)
    return EvaluationPass(
        batches,
        placeholder,
        partial(_measure, names),
        tuple(f"{term}_{quantity}" for term in names for quantity in MEASURED),
        partial(_means, {term: term_weights[term] for term in names}, not name),
        name,
    )


def _measure(names: Sequence[str], objective: nn.Module, batch: Batch) -> Measurement:
    found, sums = objective.score(batch), {}
    for name in names:
        if name in found:
            sums[f"{name}_loss"], sums[f"{name}_correct"] = found[name]
            sums[f"{name}_targets"] = batch.counts[name]
    return Measurement(sums)


def _means(
    weights: Mapping[str, float], with_total: bool, totals: Mapping[str, float], _: list[Any]
) -> dict[str, float]:
    values: dict[str, float] = {}
    loss = 0.0
    for name, weight in weights.items():
        count = totals[f"{name}_targets"]
        if count:
            values[f"{name}_loss"] = totals[f"{name}_loss"] / count
            values[f"{name}_accuracy"] = totals[f"{name}_correct"] / count
            loss += weight * values[f"{name}_loss"]
    return {"loss": loss, **values} if with_total else values
