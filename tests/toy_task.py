"""A whole task in one file: two images a sample, soft targets, a score where lower is better, written predictions.

It has nothing to do with text towers: which share of its words do the texts of a sample spend on short ones?
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from model.batch import Batch, Row, Term
from model.config import Vocabulary
from pipeline.config.options import Config
from pipeline.data.shard_reader import RawSample
from pipeline.data.tokenizer import TextTokenizer
from pipeline.loading.datasets import OtherRows, Preparation
from pipeline.loading.open_data import eval_loader, placeholder_batch
from pipeline.tasks.task import EvaluationPass, Measurement, Score


class Toy(nn.Module):
    """Guesses the distribution from the mean colours of both images."""

    term_weights = {"short": 1.0}

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(6, 2)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        term = batch.terms["short"]
        return {"short": -(term.target * self.guess(batch)[term.position]).sum()}

    def guess(self, batch: Batch) -> Tensor:
        """Log probabilities fp32 [B, 2]."""
        return self.classifier(batch.images.float().mean((3, 4)).flatten(1) / 255).float().log_softmax(1)

    def parameter_group(self, name: str) -> str:
        return "head"

    def decays(self, name: str, parameter: Tensor) -> bool:
        return parameter.ndim > 1

    def flops(self, batch: Batch) -> int:
        return 0


class ToyRows:
    def rows(self, sample: RawSample, seed: int, others: OtherRows) -> list[Row]:
        words = sample.text.split()
        share = sum(len(word) < 4 for word in words) / len(words)
        return [Row([], 0, seed, target=[share, 1 - share])]

    def placeholder(self, key: str) -> list[Row]:
        return [Row([], 0, 0, "placeholder")]


def plan(images: Tensor, rows: list[Row]) -> Batch:
    known = [number for number, row in enumerate(rows) if row.target is not None]
    target = torch.tensor([rows[number].target for number in known]).view(-1, 2)
    return Batch(images, {"short": Term("images", torch.tensor(known, dtype=torch.int64), target, "soft")})


class ToyTask:
    num_images = 2

    def build(self, config: Config, vocabulary: Vocabulary) -> nn.Module:
        return Toy()

    def preparation(self, config: Config, objective: nn.Module, tokenizer: TextTokenizer) -> Preparation:
        return Preparation(ToyRows(), plan, config.model.vision.image_size)

    def scores(self, objective: nn.Module) -> tuple[Score, ...]:
        return (Score("distance", higher_is_better=False),)

    def passes(self, config, objective, preparation, held_out, ranks) -> list[EvaluationPass]:
        loader = eval_loader(config, held_out, preparation, ranks.place, ranks.pin)
        spare = placeholder_batch(preparation, 2)
        write = lambda folder, found: (folder / "shares.json").write_text(json.dumps(found))  # noqa: E731
        return [EvaluationPass(loader, spare, measure, ("distance", "samples"), mean, write=write)]


def measure(objective: nn.Module, batch: Batch) -> Measurement:
    guess, term = objective.guess(batch).exp()[batch.terms["short"].position], batch.terms["short"]
    found = [
        {"position": position, "key": key, "share": share}
        for position, key, share in zip(batch.positions, batch.keys, guess[:, 0].tolist(), strict=True)
    ]
    return Measurement({"distance": (guess - term.target).abs().sum(), "samples": len(found)}, found)


def mean(totals: Mapping[str, float], predictions: list[Any]) -> dict[str, float]:
    return {"distance": totals["distance"] / totals["samples"]}
