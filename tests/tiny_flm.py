"""A tiny FLM and rows to feed it, for tests."""

from __future__ import annotations

import dataclasses

import torch

from model.batch import Batch, Row
from model.build import build_objective
from model.config import ModelConfig, ReconstructorConfig, TextConfig, VisionConfig, Vocabulary, objective_options

VOCABULARY = Vocabulary(size=61, bos_id=0, pad_id=1, eos_id=2, mask_id=60)
MAX_TEXT_LENGTH = 24


def tiny_config(behaviour: str = "default", dropout: float = 0.0, **reconstructor) -> ModelConfig:
    return ModelConfig(
        behaviour=behaviour,
        vision=VisionConfig(name=None, image_size=32, patch_size=16, width=32, layers=3, head_width=16),
        text=TextConfig(
            width=32, heads=2, ffn_width=64, bottom_layers=2, top_layers=2, max_positions=40, dropout=dropout
        ),
        reconstructor=ReconstructorConfig(**reconstructor),
    )


def tiny_flm(behaviour: str = "default", seed: int = 0, spread: float = 1.6, **objective) -> torch.nn.Module:
    """An eval-mode objective whose weights are large enough that outputs depend visibly on their inputs."""
    torch.manual_seed(seed)
    built = build_objective(tiny_config(behaviour), objective_options(**objective), VOCABULARY, MAX_TEXT_LENGTH)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if parameter.ndim > 1 and "vision" not in name:
                parameter.mul_(spread)
    return built.eval()


def captioner(behaviour: str = "default", name: str = "flm", spread: float = 1.2) -> torch.nn.Module:
    """An objective whose captions have different lengths: how probable `</s>` is hangs on image and words."""
    objective = tiny_flm(behaviour, seed=4, spread=spread, name=name)
    with torch.no_grad():
        objective.lm_head.weight[VOCABULARY.eos_id] *= 10
    return objective


def caption(num_words: int, seed: int = 0) -> list[int]:
    """Token ids `<s> w1 .. wk </s>` of random words."""
    generator = torch.Generator().manual_seed(seed)
    return [0, *torch.randint(3, 60, (num_words,), generator=generator).tolist(), 2]


def images(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 1, 3, 32, 32), generator=generator, dtype=torch.uint8)


def pair_rows(captions: list[list[int]]) -> list[Row]:
    return [Row(ids, number, seed=1000 + number) for number, ids in enumerate(captions)]


def flm_batch(samples: list[int]) -> Batch:
    """The batch of some samples of a fixed corpus whose captions follow from their images; every third has a negative.

    Sample number i decides everything about a sample, so any grouping into micro-batches holds the same targets.
    """
    planner = tiny_flm(corruption_rate=0.4).planner
    pictures, rows, negatives = [], [], []
    for place, number in enumerate(samples):
        first = 3 + number * 7 % 20
        pictures.append(torch.full((1, 3, 32, 32), first * 8, dtype=torch.uint8))
        words = [first + step for step in range(2 + number % 5)]
        rows.append(Row([0, *words, 2], place, seed=number))
        if number % 3 == 0:
            negatives.append(Row([0, 59, 58, 2], place, seed=number, role="negative"))
    return planner(torch.stack(pictures), rows + negatives)


def with_text(batch: Batch, text: torch.Tensor) -> Batch:
    """The batch with other token ids int64 [R, T], its plan kept as it is."""
    return dataclasses.replace(batch, plan=dataclasses.replace(batch.plan, text=text))
