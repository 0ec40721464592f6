"""The network of EVLGen: a vision tower, a connector, a language model that reads the image's tokens before the text.

Legend: B samples, I images or frames of each, P tokens of an image, Q those that the connector leaves, R text rows,
T padded length, L length of a sequence, D width of the language model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.batch import Batch, TextPlan
from model.config import ModelConfig, Vocabulary
from model.connectors.connector import Connector
from model.language.causal_lm import LanguageModel
from model.language.text_form import TextForm
from model.learning_rate_groups import declare_group
from model.vision.tower import build_tower, grid_of


class Predictions(NamedTuple):
    """Output of the network: ``before`` [R*T, D], the state before each token of each row."""

    before: Tensor


class EVLGen(nn.Module):
    """From images and text to the states that each token of the text is predicted from."""

    def __init__(self, config: ModelConfig, language: LanguageModel, vocabulary: Vocabulary, form: TextForm) -> None:
        """``language`` is taken as it is.

        Raises:
            ValueError: sizes that do not fit each other.
        """
        super().__init__()
        self.vocabulary, self.form = vocabulary, form
        self.vision = build_tower(config.vision)
        self.has_temporal = config.vision.temporal is not None
        tower = (self.vision.num_tokens, self.vision.width, grid_of(self.vision))
        self.connector = Connector(config.connector, *tower, language.width)
        self.language = language
        declare_group("rest", self.vision, self.language)
        declare_group("cross", self.connector)

    def forward(self, batch: Batch) -> Predictions:
        """Runs a whole plan."""
        return self.fuse(batch.plan, self.encode(batch.images))

    def encode(self, images: Tensor, num_tokens: int | None = None) -> Tensor:
        """uint8 [B, I, 3, S, S] -> [B, Q, D]; of a video the mean of its frames is what the connector gets."""
        return self.connector(self.features(images), num_tokens)

    def features(self, images: Tensor) -> Tensor:
        """uint8 [B, I, 3, S, S] -> [B, P, W]."""
        num_frames = images.shape[1]
        with torch.set_grad_enabled(torch.is_grad_enabled() and _is_trained(self.vision)):
            if self.has_temporal:
                tokens = self.vision(images.flatten(0, 1), num_frames)
            else:
                tokens = self.vision(images.flatten(0, 1))
            return tokens if num_frames == 1 else tokens.unflatten(0, (-1, num_frames)).mean(1)

    def fuse(self, plan: TextPlan, prefix: Tensor) -> Predictions:
        """The language side, given the image tokens [B, Q, D]."""
        num_rows, length = plan.text.shape
        inputs = self.prefix(prefix.index_select(0, plan.image_of_row))
        start = inputs.shape[1]
        inputs = torch.cat([inputs, self.language.embed(plan.text).to(inputs.dtype)], dim=1)
        is_text = torch.arange(length, device=inputs.device) < plan.lengths[:, None]
        mask = torch.cat([is_text.new_ones(num_rows, start), is_text], dim=1).long()
        states = self.language.states(inputs, mask)
        return Predictions(states[:, start - 1 : start - 1 + length].flatten(0, 1))

    def prefix(self, tokens: Tensor) -> Tensor:
        """Image tokens [R, Q, D] behind what the text's form has before them."""
        if not self.form.before:
            return tokens
        before = self.language.embed(torch.tensor(self.form.before, device=tokens.device)).to(tokens.dtype)
        return torch.cat([before.expand(len(tokens), -1, -1), tokens], dim=1)


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
