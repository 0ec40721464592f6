"""The contrastive term of pretraining: pooled texts and images of a micro-batch find each other.

Radford et al. 2021, "CLIP" (arXiv 2103.00020), section 2.3, for the symmetric loss and the learned temperature. Legend:
C contrasted pairs, B images, D width, E width of what is compared.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers import initial_std

FIRST_TEMPERATURE, MAX_SCALE = 0.07, 100.0  # as CLIP's


class PooledSimilarity(nn.Module):
    """Cosine of every pooled text and image in a space of their own, over a temperature."""

    learning_rate_group = "head"

    def __init__(self, width: int, embedding_width: int) -> None:
        super().__init__()
        self.image_projection = nn.Linear(width, embedding_width)
        self.text_projection = nn.Linear(width, embedding_width)
        self.log_scale = nn.Parameter(torch.tensor([math.log(1 / FIRST_TEMPERATURE)]))  # of one over the temperature
        for linear in (self.image_projection, self.text_projection):
            nn.init.normal_(linear.weight, std=initial_std(width))
            nn.init.zeros_(linear.bias)

    def forward(self, texts: Tensor, images: Tensor) -> Tensor:
        """[C, D], [B, D] -> fp32 [C, B]."""
        return self.embed_texts(texts) @ self.embed_images(images).T * scale(self.log_scale)

    def embed_texts(self, texts: Tensor) -> Tensor:
        """[.., D] -> fp32 [.., E], of length 1."""
        return F.normalize(self.text_projection(texts).float(), dim=-1)

    def embed_images(self, images: Tensor) -> Tensor:
        """[.., D] -> fp32 [.., E], of length 1."""
        return F.normalize(self.image_projection(images).float(), dim=-1)


def scale(log_scale: Tensor) -> Tensor:
    """One over the temperature, fp32 [1], from 1 to 100; beyond, its logarithm has no gradient."""
    return log_scale.float().clamp(0.0, math.log(MAX_SCALE)).exp()


def contrast(scores: Tensor, wrong: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """Each text finds its image among wrong images, and its image finds it among wrong texts.

    For text t of image i the mean of -log e^s(t,i) / (e^s(t,i) + sum e^s(t,j) over images j wrong for t) and of
    -log e^s(t,i) / (e^s(t,i) + sum e^s(u,i) over texts u that i is wrong for). Other texts of i are no part of the
    second sum: each is found by itself, and none is pushed away from its image for the others' sake (Feeney and Hughes
    2023, "SINCERE", arXiv 2309.14277).

    Args:
        scores: fp32 [C, B].
        wrong: bool [C, B], never True of a text's own image.
        image: int64 [C], the own image of each text.

    Returns:
        fp32 [C] losses, 0 where nothing is wrong; fp32 [C] the share of the two that is found.
    """
    own = scores.gather(1, image[:, None])
    sides = ((scores, wrong), (scores.T.index_select(0, image), wrong.T.index_select(0, image)))
    losses, found = [], []
    for others, is_wrong in sides:
        others = others.masked_fill(~is_wrong, float("-inf"))
        losses.append(torch.cat([own, others], dim=1).logsumexp(1) - own[:, 0])
        found.append((own > others).all(1).float())
    return (losses[0] + losses[1]) / 2, (found[0] + found[1]) / 2
