"""What every pretraining objective is: a network, a planner, heads, and the weights of its loss terms.

``Pretraining`` returns the sum of losses per term; counts are known from the batch. Legend: M targets of a term.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.batch import Batch, Planner, Term
from model.config import ModelConfig, ObjectiveOptions
from model.flops import forward_macs, training_flops
from model.heads import LanguageModelHead, MatchingHead
from model.learning_rate_groups import declared_group
from model.objectives.contrast import PooledSimilarity, contrast
from model.text_states import mean_of_words, packed_index


class Pretraining(nn.Module):
    """A network with a vocabulary head for its language terms and image-text matching for its CLS feature.

    With ``objective.itc_weight`` also the contrast of texts and images, each pooled before they meet.
    ``term_weights`` holds the factor of each term's mean, which the caller takes over all ranks.
    """

    def __init__(
        self,
        model: ModelConfig,
        objective: ObjectiveOptions,
        net: nn.Module,
        planner: Planner,
        language_weights: dict[str, float],
    ) -> None:
        super().__init__()
        self.config, self.name = model, objective.name
        self.net, self.planner = net, planner
        self.lm_head = LanguageModelHead(model.text.width, net.vocabulary.size)
        self.term_weights = dict(language_weights)
        if model.behaviour == "default":
            self.term_weights["itm"] = objective.itm_weight
            self.itm_head = MatchingHead(model.text.width)
        self.itc_head: PooledSimilarity | None = None
        if objective.itc_weight:
            self.term_weights["itc"] = objective.itc_weight
            self.itc_head = PooledSimilarity(model.text.width, objective.itc_width)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Sum of losses of each term, fp32 scalars with gradient."""
        return {name: losses.sum() for name, (losses, _) in self._losses(batch).items()}

    @torch.no_grad()
    def score(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """(sum of losses, number of correct predictions) of each term, fp32 scalars."""
        return {name: (losses.sum(), correct.float().sum()) for name, (losses, correct) in self._losses(batch).items()}

    def _losses(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Loss fp32 [M] and correctness bool [M] of every target; one pass of the vocabulary head for all terms."""
        output = self.net(batch)
        results = token_losses(self.lm_head, output, batch.terms)
        for name, term in batch.terms.items():
            if term.kind == "class":
                results[name] = self._classify(getattr(self, f"{name}_head"), _selected(output, term), term.target)
            if term.kind == "contrast":
                results[name] = self._contrast(output, batch, term)
        return results

    def _contrast(self, output: Any, batch: Batch, term: Term) -> tuple[Tensor, Tensor]:
        """Of the rows of ``term`` [M], which this micro-batch's images may be wrong for."""
        texts, images = self.pooled(output, batch)
        scores = self.itc_head(texts.index_select(0, term.position), images)
        return contrast(scores, term.target, batch.plan.image_of_row.index_select(0, term.position))

    def pooled(self, output: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """What ``itc`` compares, in the dtype of the network: of each row the mean over its words of the states behind
        the bottom half (FLM: of both streams) [R, D], of each image the mean over its projected tokens [B*I, D].
        """
        texts = mean_of_words(output.bottom, packed_index(batch.plan), batch.plan)
        images = output.images.mean(1, dtype=torch.float32)
        return texts.to(output.bottom.dtype), images.to(output.images.dtype)

    def match(self, features: Tensor) -> Tensor:
        """Log odds fp32 [M] that the text of CLS features [M, D] is its image's own, by image-text matching."""
        logits = self.itm_head(self.net.pooler(features)).float()
        return logits[:, 1] - logits[:, 0]

    def _classify(self, head: nn.Module, features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(self.net.pooler(features)).float()
        return F.cross_entropy(logits, target, reduction="none"), logits.argmax(1) == target

    def features(self, batch: Batch) -> Tensor:
        """What the network makes of the rows with role "read": the CLS state (before the pooler) next to the mean of
        the last layer's states of the words, FLM's over both streams; zeros in the place of the mean without words.

        Returns:
            fp32 [M, 2D], read rows in their order in the batch, with gradient.

        Raises:
            ValueError: no row has that role.
        """
        term = next((term for term in batch.terms.values() if term.kind == "feature"), None)
        if term is None:
            raise ValueError('no features to compute: no row of the batch has the role "read"')
        output, plan = self.net(batch), batch.plan
        states = torch.cat([output.l2r, output.r2l]) if self.name == "flm" else output.l2r
        words = mean_of_words(states, torch.cat([plan.l2r_index, plan.r2l_index]), plan)
        return torch.cat([_selected(output, term).float(), words[term.target]], dim=1)

    def flops(self, batch: Batch) -> int:
        """Floating-point operations of forward and backward on the batch (see :mod:`model.flops`)."""
        streams = 2 if self.name == "flm" else 1
        width = 0 if self.itc_head is None else self.itc_head.text_projection.out_features
        macs = forward_macs(self.config, self.net.vision, self.net.vocabulary.size, batch, streams, width)
        return training_flops(self.config, macs)

    def parameter_group(self, name: str) -> str:
        """Learning-rate group of a parameter, as its module declares it (specification section 7)."""
        return declared_group(self, name)

    def decays(self, name: str, parameter: Tensor) -> bool:
        """Whether weight decay applies: matrices and embedding tables.

        # NOTE release: CLIP's LayerNorm scales and class embedding are decayed too; here: no vector is, as is usual.
        # NOTE release: the pooler, which no loss reaches in released behaviour, keeps its weights; here: ZeRO hands the
        # optimizer a gradient of zeros, so that it is decayed, by 6 % over 30,000 steps. Nothing reads it meanwhile.
        """
        return parameter.ndim > 1


def token_losses(head: LanguageModelHead, output: Any, terms: Mapping[str, Term]) -> dict[str, tuple[Tensor, Tensor]]:
    """Loss fp32 [M] and correctness bool [M] of every target of the terms of kind "token", by one pass of the head."""
    tokens = {name: term for name, term in terms.items() if term.kind == "token"}
    losses, correct = head(
        torch.cat([_selected(output, term) for term in tokens.values()]),
        torch.cat([term.target for term in tokens.values()]),
    )
    sizes = [len(term.target) for term in tokens.values()]
    return dict(zip(tokens, zip(losses.split(sizes), correct.split(sizes), strict=True), strict=True))


def _selected(output: Any, term: Term) -> Tensor:
    """The states [M, D] that a term's targets are predicted from."""
    return getattr(output, term.source).index_select(0, term.position)
