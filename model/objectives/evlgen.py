"""The objective of EVLGen: each token of a text from those before it and from the image, one stage, one loss."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.batch import Batch
from model.evlgen import EVLGen
from model.learning_rate_groups import declared_group
from model.plans.language import LanguagePlanner

OUTPUT = "net.connector.output.weight"


class ImageToText(nn.Module):
    """Next-token loss (term ``caption``) of a language model that reads image tokens first."""

    name = "evlgen"
    elsewhere = (r"net\.vision\.(?!blocks\.\d+\.temporal\.).+", r"net\.language\..+")  # weights that no import has

    not_read = (r"net\.text\..+",)  # how a Q-Former reads texts in its first stage

    def __init__(self, net: EVLGen) -> None:
        super().__init__()
        self.net = net
        fewest, most = net.connector.config.fewest_tokens, net.connector.num_tokens
        tokens = None if fewest is None else (fewest, most)
        self.form, self.planner = net.form, LanguagePlanner(net.vocabulary, net.form, tokens=tokens)
        self.term_weights = {"caption": 1.0}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Sum of losses over all targets, an fp32 scalar with gradient."""
        return {"caption": self._losses(batch)[0].sum()}

    @torch.no_grad()
    def score(self, batch: Batch, tokens: Tensor | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """(sum of losses, number of correct predictions), fp32 scalars; ``tokens`` [B, Q, D] of the images, where they
        are encoded already."""
        losses, correct = self._losses(batch, tokens)
        return {"caption": (losses.sum(), correct.float().sum())}

    def _losses(self, batch: Batch, tokens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        term = batch.terms["caption"]
        found = self.net(batch) if tokens is None else self.net.fuse(batch.plan, tokens)
        return self.lm_head(getattr(found, term.source).index_select(0, term.position), term.target)

    @torch.no_grad()
    def begin_with(self, images: Tensor, fresh: bool) -> None:
        """Fits what is random to the first training ``images``, uint8 [B, I, 3, S, S] or features [B, I, P, W].

        The connector's last layer; with ``fresh``, where all of it is, its norm too (``ConnectorConfig.standardise``).
        """
        features = self.net.features(images)
        if fresh and self.net.connector.config.standardise:
            self.net.connector.norm.standardise(features)
        self.net.scale_prefix(features)

    def fresh_from(self, names: Collection[str]) -> list[str]:
        """Patterns of what may begin anew in a model that starts from a run with weights of these ``names``.

        Raises:
            ValueError: the run has adapters and this model none, or others.
        """
        own, theirs = (
            {name for name in some if ".adapter." in name} for some in (dict(self.named_parameters()), names)
        )
        if theirs and own != theirs:
            raise ValueError(
                f"has adapters of its language model ({sorted(theirs ^ own)[0]} differs), which only a model with the"
                " same ones continues; set model.language.lora_rank and lora_modules to the run's"
            )
        fresh = [r"net\.language\.llm\.(?!.+\.adapter\.).+"]  # loaded by its own name
        fresh += [] if theirs else [r"net\.language\..+\.adapter\..+"]
        return fresh + ([] if OUTPUT in names else [r"net\.connector\.output\.(weight|bias)"])

    def lm_head(self, states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """[M, D] states, int64 [M] -> fp32 [M] losses with gradient, bool [M] whether no token is more probable."""
        logits = self.net.language.logits(states).float()
        return F.cross_entropy(logits, labels, reduction="none"), logits.argmax(1) == labels

    def flops(self, batch: Batch) -> int:
        """Floating-point operations of forward and backward on the batch (see :mod:`model.flops`).

        Of a frozen tower forward alone; of the language model forward and the gradients of its inputs, as its weights
        have none but those of adapters.
        """
        net, num_images = self.net, batch.images.shape[0] * batch.images.shape[1]
        num_sequences, length = batch.plan.text.shape
        num_tokens = batch.plan.num_tokens or net.connector.num_tokens
        length += num_tokens + len(net.form.before)
        head = len(batch.terms["caption"].target) * net.language.num_tokens * net.language.width
        tower = 6 if any(parameter.requires_grad for parameter in net.vision.parameters()) else 2
        tower = 0 if batch.images.ndim == 4 else tower
        return (
            tower * num_images * net.vision.macs
            + 6 * batch.images.shape[0] * net.connector.macs(num_tokens)
            + 4 * (net.language.macs(num_sequences, length) + head)
            + 2 * net.language.adapter_macs(num_sequences, length)
        )

    def parameter_group(self, name: str) -> str:
        """Learning-rate group of a parameter, as its module declares it."""
        return declared_group(self, name)

    def decays(self, name: str, parameter: Tensor) -> bool:
        """Whether weight decay applies: matrices and tables.

        # NOTE release: the gates of frames (``alpha``, no dimension) are decayed too; here: no gate is.
        """
        return parameter.ndim > 1
