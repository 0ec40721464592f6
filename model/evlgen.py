"""The network of EVLGen: a vision tower, a connector, a language model that reads the image's tokens before the text.

Legend: B samples, I images or frames of each, P tokens of an image, Q those that the connector leaves, S sequences of
text, L their padded length, D width of the language model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.batch import Batch, LanguagePlan
from model.config import ModelConfig, Vocabulary
from model.connectors.connector import Connector
from model.language.causal_lm import LanguageModel
from model.language.text_form import TextForm
from model.learning_rate_groups import declare_group
from model.vision.tower import build_tower, grid_of, tokens_of

IN_FRONT = -2  # of all texts: the image's tokens, and what the form has before them


class Predictions(NamedTuple):
    """Output of the network: ``before`` [S*L, D], the state before each token of each sequence."""

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
        self.recompute = self.vision.recompute = self.connector.body.recompute = config.activation_checkpointing
        if self.recompute:
            language.recompute_layers()
        self.language = language
        self.register_buffer("before", torch.tensor(form.before, dtype=torch.int64), persistent=False)
        declare_group("rest", self.vision, self.language)
        declare_group("cross", self.connector)

    @torch.no_grad()
    def scale_prefix(self, features: Tensor) -> None:
        """Scales the connector's last layer so that image tokens are as large as the language model's embeddings.

        In rms, over images of ``features`` [B, P, W]; from the connector's own initialisation they would be smaller by
        an order of magnitude, and to grow takes most of a short training.
        """
        table = self.language.llm.get_input_embeddings().weight
        tokens = self.connector(features.to(self.connector.output.weight))
        self.connector.output.weight.mul_(_rms(table) / _rms(tokens))

    def forward(self, batch: Batch) -> Predictions:
        """Runs a whole plan."""
        num_tokens = batch.plan.num_tokens if self.training else 0
        return self.fuse(batch.plan, self.encode(batch.images, num_tokens or None))

    def encode(self, images: Tensor, num_tokens: int | None = None) -> Tensor:
        """uint8 [B, I, 3, S, S] -> [B, Q, D]; of a video the mean of its frames is what the connector gets."""
        return self.connector(self.features(images), num_tokens)

    def encode_each_once(self, images: Tensor) -> Tensor:
        """As ``encode``, without work for an image that is equal to the one before it: questions come image by image.

        Waits for the device once.
        """
        new = torch.ones(len(images), dtype=torch.bool, device=images.device)
        new[1:] = (images[1:] != images[:-1]).flatten(1).any(1)
        return self.encode(images[new]).index_select(0, new.cumsum(0) - 1)

    def features(self, images: Tensor) -> Tensor:
        """uint8 [B, I, 3, S, S], or features [B, I, P, W] -> [B, P, W]."""
        num_frames = images.shape[1]
        with torch.set_grad_enabled(torch.is_grad_enabled() and _is_trained(self.vision)):
            tokens = tokens_of(self.vision, images, num_frames if self.has_temporal else 1)
            tokens = tokens.to(self.connector.norm.weight.dtype)
            return tokens if num_frames == 1 else tokens.unflatten(0, (-1, num_frames)).mean(1)

    def fuse(self, plan: LanguagePlan, tokens: Tensor) -> Predictions:
        """The language side, given the image tokens [B, Q, D]."""
        inputs = self.prefix(tokens.index_select(0, plan.image))
        start = inputs.shape[1]
        inputs = torch.cat([inputs, self.language.embed(plan.text).to(inputs.dtype)], dim=1)
        number = F.pad(plan.number, (start, 0), value=IN_FRONT)
        first = torch.arange(start, device=inputs.device).expand(len(inputs), -1)
        places = torch.cat([first, start + plan.place], dim=1)
        # always a mask: without one transformers looks at values of the positions, for which the host waits
        states = self.language.states(inputs, added=_seen(number, inputs.dtype), places=places)
        last, states = states[:, start - 1 : start], states[:, start:]
        before = torch.cat([last, states[:, :-1]], dim=1)
        return Predictions(torch.where((plan.place == 0)[..., None], last, before).flatten(0, 1))

    def prefix(self, tokens: Tensor) -> Tensor:
        """Image tokens [R, Q, D] behind what the text's form has before them."""
        if not len(self.before):
            return tokens
        before = self.language.embed(self.before).to(tokens.dtype)
        return torch.cat([before.expand(len(tokens), -1, -1), tokens], dim=1)


def _seen(number: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores, [S, 1, L, L]: 0 where a token sees another, else the least number of ``dtype``.

    A token sees what stands in front of all texts and what stands before it in its own, by ``number`` int64 [S, L].
    """
    same = (number[:, None, :] == number[:, :, None]) | (number == IN_FRONT)[:, None, :]
    allowed = same.tril() | torch.eye(number.shape[1], dtype=torch.bool, device=number.device)
    added = torch.zeros(allowed.shape, dtype=dtype, device=number.device)
    return added.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]


def _rms(values: Tensor) -> Tensor:
    return values.float().square().mean().sqrt()


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
