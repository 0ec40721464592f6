"""What every pretraining objective is: a network, a planner, heads, and the weights of its loss terms.

``Pretraining`` returns the sum of losses per term; counts are known from the batch. Legend: M targets of a term.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.batch import Batch, Planner, Term, TextPlan
from model.config import ModelConfig, ObjectiveOptions
from model.flops import forward_macs, training_flops
from model.heads import LanguageModelHead, MatchingHead
from model.learning_rate_groups import declared_group


class Pretraining(nn.Module):
    """A network with a vocabulary head for its language terms and image-text matching for its CLS feature.

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
        return results

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
        streams = [(output.l2r, plan.l2r_index)]
        if self.name == "flm":
            streams.append((output.r2l, plan.r2l_index))
        return torch.cat([_selected(output, term).float(), _mean_of_words(streams, plan)[term.target]], dim=1)

    def flops(self, batch: Batch) -> int:
        """Floating-point operations of forward and backward on the batch (see :mod:`model.flops`)."""
        streams = 2 if self.name == "flm" else 1
        macs = forward_macs(self.config, self.net.vision, self.net.vocabulary.size, batch, streams)
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


def _mean_of_words(streams: list[tuple[Tensor, Tensor]], plan: TextPlan) -> Tensor:
    """Mean of the states of each row's words, fp32 [R, D], from streams ([N, D] states, int64 [N] flat positions)."""
    num_rows, num_positions = plan.text.shape
    total = plan.text.new_zeros((num_rows, streams[0][0].shape[1]), dtype=torch.float32)
    for states, index in streams:
        row, position = index // num_positions, index % num_positions
        is_word = (position >= 1) & (position < plan.lengths[row] - 1)
        total = total.index_add(0, row, states.float() * is_word[:, None])
    return total / (len(streams) * (plan.lengths - 2)).clamp(min=1)[:, None]
