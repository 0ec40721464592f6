"""Multinomial logistic regression with an L2 penalty on frozen features: what a linear reading finds in them.

Legend: N items, F features, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PENALTIES = (1e-2, 1e-3, 1e-4, 1e-5)
HELD_BACK = 5  # every fifth group of the training items chooses the penalty
MAX_ITERATIONS = 100


class Linear(NamedTuple):
    """Class scores are ``features @ weight + bias``: fp32 [F, C] and [C]."""

    weight: Tensor
    bias: Tensor

    def predict(self, features: Tensor) -> Tensor:
        """int64 [N], the best class."""
        return (features @ self.weight + self.bias).argmax(1)


def fit(features: Tensor, labels: Tensor, num_classes: int, penalty: float, start: Linear | None = None) -> Linear:
    """Minimises mean cross-entropy + ``penalty``/2 * |weight|^2 (biases are free) by L-BFGS, from ``start`` or zeros,
    in at most MAX_ITERATIONS iterations: what they leave undone is part of the probe, equal for all models.

    Args:
        features: fp32 [N, F].
        labels: int64 [N], 0 .. num_classes-1.
    """
    shape = (features.shape[1], num_classes)
    weight, bias = start or Linear(features.new_zeros(shape), features.new_zeros(num_classes))
    weight, bias = (part.clone().requires_grad_() for part in (weight, bias))
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=MAX_ITERATIONS,
        tolerance_grad=1e-6,
        tolerance_change=1e-7,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(features @ weight + bias, labels) + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return Linear(weight.detach(), bias.detach())


class Reading(NamedTuple):
    """What a probe finds: whether each test item is right (bool [N]), and the penalty that was chosen."""

    correct: Tensor
    penalty: float

    @property
    def accuracy(self) -> float:
        return self.correct.double().mean().item()


def read(
    features: Tensor,
    labels: Tensor,
    groups: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    num_classes: int,
    penalties: Sequence[float] = PENALTIES,
) -> Reading:
    """Fits on the training items, tests on the others; features are standardised by the training items.

    The penalty is the one that does best on a fifth of the training ``groups`` (images: what is asked about one image
    stays together) after fitting on the rest; the final fit has all of them. A test label of -1 is never right.

    Args:
        features: float [N, F]; labels and groups: int64 [N]; the test items alike.
    """
    mean, deviation = features.double().mean(0), features.double().std(0).clamp_min(1e-6)
    features, test_features = (((part - mean) / deviation).float() for part in (features, test_features))
    held_back = groups % HELD_BACK == 0
    best, found, start, model = -1.0, penalties[0], None, None
    for penalty in sorted(penalties, reverse=True):  # from strong to weak, each starts where the last one ended
        model = fit(features[~held_back], labels[~held_back], num_classes, penalty, model)
        right = (model.predict(features[held_back]) == labels[held_back]).double().mean().item()
        if right > best:
            best, found, start = right, penalty, model
    model = fit(features, labels, num_classes, found, start)
    return Reading(model.predict(test_features) == test_labels, found)
