"""Output heads: of words, of classes, of one number, and the pooler of the CLS feature.

Legend: M targets, D width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.cpu.door import KeptMemory
from model.cross_entropy import chunked_cross_entropy
from model.layers import TOP_EPS, initial_std

CLASSIFIER_EPS = 1e-5


class LanguageModelHead(nn.Module):
    """Linear, GELU, LayerNorm, then a vocabulary projection with separate bias (specification section 2.7)."""

    learning_rate_group = "head"

    def __init__(self, width: int, vocabulary_size: int, chunk_size: int = 8192) -> None:
        """``chunk_size``: vocabulary entries whose logits are held at once."""
        super().__init__()
        self.chunk_size = chunk_size
        self._memory = KeptMemory()  # of the weight's gradient
        self.transform = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=TOP_EPS)
        self.weight = nn.Parameter(torch.empty(vocabulary_size, width))
        self.bias = nn.Parameter(torch.zeros(vocabulary_size))
        for weight in (self.transform.weight, self.weight):
            nn.init.normal_(weight, std=initial_std(width))
        nn.init.zeros_(self.transform.bias)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor] | Tensor:
        """Cross entropy of each target; without labels, logits.

        Args:
            features: [M, D].
            labels: int64 [M].

        Returns:
            fp32 [M] losses with gradient, bool [M] whether the label's logit is larger than all others; or [M, V].
        """
        hidden = self.hidden(features)
        if labels is None:
            return F.linear(hidden, self.weight, self.bias)
        return chunked_cross_entropy(hidden, self.weight, self.bias, labels, self.chunk_size, self._memory)

    def hidden(self, features: Tensor) -> Tensor:
        return self.norm(F.gelu(self.transform(features)))

    def logits(self, features: Tensor) -> Tensor:
        """[M, D] -> [M, V], for decoding and parity tests; a call of the module, so that ZeRO-3 gathers its weights."""
        return self(features)


class MatchingHead(nn.Linear):
    """Two logits of the pooled CLS feature: a caption of another sample, its own."""

    learning_rate_group = "head"

    def __init__(self, width: int) -> None:
        super().__init__(width, 2)
        nn.init.normal_(self.weight, std=initial_std(width))
        nn.init.zeros_(self.bias)


class ClassifierHead(nn.Sequential):
    """Linear, LayerNorm, GELU, linear on the pooled CLS features of a text with each of its images, side by side.

    Hidden width, eps and parameter names are the release's (specification sections 7.1 and 7.2).
    """

    learning_rate_group = "head"

    def __init__(self, width: int, num_classes: int, num_images: int = 1) -> None:
        """``width``: D of one feature; the head takes [M, num_images * D]."""
        hidden = 2 * width
        norm = nn.LayerNorm(hidden, eps=CLASSIFIER_EPS)
        super().__init__(nn.Linear(num_images * width, hidden), norm, nn.GELU(), nn.Linear(hidden, num_classes))
        for linear in (self[0], self[3]):
            nn.init.normal_(linear.weight, std=initial_std(width))
            nn.init.zeros_(linear.bias)


class RankHead(nn.Linear):
    """One number of the pooled CLS feature, by which texts of an image, or images of a text, are ranked."""

    learning_rate_group = "rest"  # as in the release, whose other heads learn faster

    def __init__(self, width: int) -> None:
        super().__init__(width, 1)
        nn.init.normal_(self.weight, std=initial_std(width))
        nn.init.zeros_(self.bias)


class Pooler(nn.Module):
    """Linear and tanh on the CLS query."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        """[M, D] -> [M, D]."""
        return torch.tanh(self.dense(features))
