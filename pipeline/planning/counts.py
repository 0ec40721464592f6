"""What a plan counts: parameters, by what is trained of them, and the work of one micro-batch.

A part that is frozen enters by its parameters, its forward pass and no backward; a network of another kind by what
running it without values finds. Nothing here knows a model's layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import torch
from torch import nn

from model.batch import Batch, Row
from model.config import Vocabulary
from model.objectives.captioning import Captioning
from model.objectives.evlgen import ImageToText
from pipeline.config.task_options import TaskOptions
from pipeline.planning.activations import Activations, DeviceKind, measure

LENGTH_DEVIATION = 0.38  # of the logarithm of a caption's tokens: Conceptual Captions by byte-level BPE
TEXT_TOKENS = 12.0  # of a caption with both ends, of the same captions
A_VOTE = [(0, 1.0)]
TASKS_OF_CLASSES = {"vqa": A_VOTE, "gqa": A_VOTE, "okvqa": A_VOTE, "nlvr2": 0, "snli_ve": 0}  # a target of each


@dataclass(frozen=True)
class Parameters:
    """Elements of every parameter: of those that are trained, by group of the optimizer; of those that are frozen.

    ``modules`` is the number of modules of the network, of every level.
    """

    groups: tuple[tuple[int, ...], ...]
    frozen_sizes: tuple[int, ...]
    modules: int = 0

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        return tuple(size for group in self.groups for size in group)

    @cached_property
    def trained(self) -> int:
        return sum(self.sizes)

    @cached_property
    def frozen(self) -> int:
        return sum(self.frozen_sizes)

    @property
    def largest(self) -> int:
        return max(self.sizes, default=0)

    @property
    def largest_group(self) -> int:
        return max(map(sum, self.groups), default=0)

    def below(self, elements: float) -> int:
        """Elements of all trained parameters that have fewer than ``elements``."""
        return sum(size for size in self.sizes if size < elements)


@dataclass(frozen=True)
class Work:
    """One micro-batch of ``samples`` on one rank; operations are floating-point, tokens with their two ends."""

    samples: int
    tokens: int
    flops: float  # of the model: forward and backward, as Objective.flops counts them
    recomputed_flops: float  # of a forward pass that is run again for backward
    image_bytes: int
    activations: Activations


def count_parameters(objective: nn.Module) -> Parameters:
    """The parameters of an objective; a tensor that is shared counts once."""
    groups: dict[tuple[str, bool], list[int]] = {}
    frozen = []
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            key = objective.parameter_group(name), objective.decays(name, parameter)
            groups.setdefault(key, []).append(parameter.numel())
        else:
            frozen.append(parameter.numel())
    return Parameters(tuple(map(tuple, groups.values())), tuple(frozen), sum(1 for _ in objective.modules()))


def count_work(
    objective: nn.Module, batch: Batch, kind: DeviceKind, recomputes: bool, large_bytes: int = 1 << 62
) -> Work:
    """What one pass over ``batch`` costs; objective and images are on the meta device (see ``activations.measure``)."""
    flops = objective.flops(batch)
    activations = measure(objective, batch, objective.term_weights, kind, large_bytes)
    num_tokens = 0 if batch.plan is None else int(batch.plan.lengths.sum())
    again = _forward_flops_of_trained(objective, batch, flops) if recomputes else 0.0
    return Work(batch.images.shape[0], num_tokens, flops, again, batch.images.nbytes, activations)


def _forward_flops_of_trained(objective: nn.Module, batch: Batch, flops: float) -> float:
    """Of forward, backward and forward again the third part; a frozen tower runs once, which is all it has."""
    tower = objective.net.vision
    frozen = not any(parameter.requires_grad for parameter in tower.parameters())
    once = 2 * tower.macs * batch.images.shape[0] * batch.images.shape[1] if frozen else 0
    return (flops - once) / 3


def example_batch(
    objective: nn.Module,
    task: TaskOptions,
    image_shape: Sequence[int],
    num_samples: int,
    lengths: Sequence[int],
    texts_per_image: int = 1,
) -> Batch:
    """A micro-batch as the task's loader makes them, of texts without sense.

    Args:
        objective: with its planner.
        task: options of the task.
        image_shape: [I, 3, S, S] of a sample, I its images or frames.
        num_samples: B.
        lengths: tokens of as many texts as :func:`texts_of` says.
        texts_per_image: of a sample.
    """
    vocabulary: Vocabulary = objective.net.vocabulary
    word = next(one for one in range(vocabulary.size) if one not in vocabulary.special_ids)
    remaining = iter(lengths)

    def text() -> list[int]:
        return [vocabulary.bos_id, *[word] * (next(remaining) - 2), vocabulary.eos_id]

    chooses = task.name in TASKS_OF_CLASSES and not isinstance(objective, Captioning | ImageToText)
    rows = _rows(task, num_samples, text, texts_per_image, image_shape[0], chooses)
    share = getattr(objective.planner, "negative_share", 0.0) if task.name == "pretraining" else 0.0
    negatives = range(min(num_samples, math.ceil(num_samples * share)))
    rows += [Row(text(), number * image_shape[0], number, "negative", "other") for number in negatives]
    images = torch.empty((num_samples, *image_shape), dtype=torch.uint8, device="meta")
    planner = objective.planner() if isinstance(objective, Captioning) else objective.planner
    return planner(images, rows)


def texts_of(objective: nn.Module, task: TaskOptions, num_samples: int, texts_per_image: int = 1) -> int:
    """How many texts :func:`example_batch` wants for ``num_samples``."""
    per_sample = texts_per_image
    if task.name == "retrieval" and task.negatives != "in_batch":
        per_sample += task.num_negatives
    share = getattr(objective.planner, "negative_share", 0.0) if task.name == "pretraining" else 0.0
    return num_samples * per_sample + math.ceil(num_samples * share)


def _rows(
    task: TaskOptions,
    num_samples: int,
    text: Callable[[], list[int]],
    texts_per_image: int,
    num_images: int,
    chooses: bool,
) -> list[Row]:
    rows: list[Row] = []
    for sample in range(num_samples):
        name = str(sample)
        for _ in range(texts_per_image):
            if chooses:
                ids, target = text(), TASKS_OF_CLASSES[task.name]
                images = range(sample * num_images, (sample + 1) * num_images)
                rows += [Row(ids, image, sample, "read", name, target) for image in images]
            elif task.name == "retrieval":
                count = 1 if task.negatives == "in_batch" else 1 + task.num_negatives
                rows += [Row(text(), sample * num_images, sample, "read", name) for _ in range(count)]
            else:  # captions; an answer that is written follows a question of one word here
                target = 2 if task.name in TASKS_OF_CLASSES else None
                rows.append(Row(text(), sample * num_images, sample, "pair", name, target))
    return rows


def text_lengths(count: int, mean: float, longest: int) -> list[int]:
    """Tokens, both ends counted, of ``count`` texts at evenly spaced quantiles of a log-normal distribution.

    Its mean is ``mean`` before texts are cut to ``longest``; no text is shorter than 3.
    """
    normal = NormalDist(math.log(mean) - LENGTH_DEVIATION**2 / 2, LENGTH_DEVIATION)
    quantiles = [normal.inv_cdf((number + 0.5) / count) for number in range(count)]
    ordered = [min(max(round(math.exp(value)), 3), longest) for value in quantiles]
    return ordered[::2] + ordered[1::2][::-1]  # short and long in every part of a batch
