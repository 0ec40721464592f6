"""Pretraining objectives: a network, a planner and weights of loss terms make one; all share towers and heads.

``Pretraining`` returns the sum of losses per term; counts are known from the batch. Legend: M targets of a term.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.batch import Batch, Planner
from model.config import ModelConfig, ObjectiveConfig, Vocabulary
from model.flm import FLM
from model.flops import training_flops
from model.heads import LanguageModelHead
from model.one_stream import OneStream
from model.plans.baselines import MLMPlanner, PrefixPlanner, ReleasedARPlanner, ReleasedMLMPlanner
from model.plans.flm import FLMPlanner, ReleasedPlanner
from model.text import initial_std


def flm(
    model: ModelConfig, objective: ObjectiveConfig, vocabulary: Vocabulary, max_text_length: int, share: float
) -> Pretraining:
    """Reconstruction of all words and the two language-model losses (specification section 5).

    Total = (flm + a l2r + b r2l) / (1 + a + b) + c itm, each a mean over its targets.
    """
    planner: Planner
    if model.behaviour == "released":
        planner = ReleasedPlanner(vocabulary, objective.corruption_rate, max_text_length)
    else:
        centred = objective.span_placement == "centred"
        planner = FLMPlanner(vocabulary, objective.corruption_rate, share, centred=centred)
    total = 1 + objective.l2r_weight + objective.r2l_weight
    weights = {"flm": 1 / total, "l2r": objective.l2r_weight / total, "r2l": objective.r2l_weight / total}
    sources = {"flm": "queries", "l2r": "l2r", "r2l": "r2l", "itm": "queries"}
    return Pretraining(model, objective, FLM(model, vocabulary), planner, weights, sources)


def mlm(
    model: ModelConfig, objective: ObjectiveConfig, vocabulary: Vocabulary, max_text_length: int, share: float
) -> Pretraining:
    """Masked language modelling (specification section 4)."""
    chosen = (vocabulary, objective.mask_rate, objective.prediction_rate, objective.whole_words, share)
    planner: Planner = MLMPlanner(*chosen)
    if model.behaviour == "released":
        planner = ReleasedMLMPlanner(*chosen, full_stop=True, max_text_length=max_text_length)
    net = OneStream(model, vocabulary, causal=False)
    return Pretraining(model, objective, net, planner, {"mlm": 1.0}, {"mlm": "l2r", "itm": "l2r"})


def ar(
    model: ModelConfig, objective: ObjectiveConfig, vocabulary: Vocabulary, max_text_length: int, share: float
) -> Pretraining:
    """Autoregressive language modelling: each token from the ones before it."""
    planner: Planner = PrefixPlanner("ar", vocabulary, 0.0, share)
    if model.behaviour == "released":
        planner = ReleasedARPlanner(vocabulary)
    net = OneStream(model, vocabulary, causal=True)
    return Pretraining(model, objective, net, planner, {"ar": 1.0}, {"ar": "l2r", "itm": "l2r"})


def prefixlm(
    model: ModelConfig, objective: ObjectiveConfig, vocabulary: Vocabulary, max_text_length: int, share: float
) -> Pretraining:
    """AR after a prefix whose tokens see each other and are not predicted."""
    planner = PrefixPlanner("prefixlm", vocabulary, objective.prefix_share, share)
    net = OneStream(model, vocabulary, causal=True)
    return Pretraining(model, objective, net, planner, {"prefixlm": 1.0}, {"prefixlm": "l2r", "itm": "l2r"})


OBJECTIVES = {"flm": flm, "mlm": mlm, "ar": ar, "prefixlm": prefixlm}


class Pretraining(nn.Module):
    """A network with a vocabulary head for its language terms and image-text matching for its CLS feature.

    ``term_weights`` holds the factor of each term's mean, which the caller takes over all ranks.
    """

    def __init__(
        self,
        model: ModelConfig,
        objective: ObjectiveConfig,
        net: nn.Module,
        planner: Planner,
        language_weights: dict[str, float],
        sources: Mapping[str, str],
    ) -> None:
        """``sources``: for each term, the field of the network's output that its targets point into."""
        super().__init__()
        self.config, self.name = model, objective.name
        self.net, self.planner = net, planner
        self.lm_head = LanguageModelHead(model.text.width, net.vocabulary.size)
        self.term_weights = dict(language_weights)
        self._sources = sources  # the CLS feature of a read row stands where itm's does
        if model.behaviour == "default":
            self.term_weights["itm"] = objective.itm_weight
            self.itm_head = nn.Linear(model.text.width, 2)
            nn.init.normal_(self.itm_head.weight, std=initial_std(model.text.width))
            nn.init.zeros_(self.itm_head.bias)

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
        language = {name: term for name, term in batch.terms.items() if name not in ("itm", "read")}
        selected = [
            getattr(output, self._sources[name]).index_select(0, term.position) for name, term in language.items()
        ]
        labels = torch.cat([term.label for term in language.values()])
        losses, correct = self.lm_head(torch.cat(selected), labels)
        sizes = [term.label.shape[0] for term in language.values()]
        results = dict(zip(language, zip(losses.split(sizes), correct.split(sizes), strict=True), strict=True))
        if "itm" in batch.terms:
            results["itm"] = self._match(getattr(output, self._sources["itm"]), batch)
        return results

    def _match(self, features: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        position, label = batch.terms["itm"]
        logits = self.itm_head(self.net.pooler(features.index_select(0, position))).float()
        return F.cross_entropy(logits, label, reduction="none"), logits.argmax(1) == label

    def features(self, batch: Batch) -> Tensor:
        """What the network makes of the rows with role "read": the CLS state (before the pooler) next to the mean of
        the last layer's states of the words, FLM's over both streams; zeros in the place of the mean without words.

        Returns:
            fp32 [M, 2D], read rows in their order in the batch, with gradient.

        Raises:
            ValueError: no row has that role.
        """
        if "read" not in batch.terms:
            raise ValueError('no features to compute: no row of the batch has the role "read"')
        output = self.net(batch)
        position, row = batch.terms["read"]
        cls = getattr(output, self._sources["itm"]).index_select(0, position)
        streams = [(output.l2r, batch.l2r_index)]
        if self.name == "flm":
            streams.append((output.r2l, batch.r2l_index))
        return torch.cat([cls.float(), _mean_of_words(streams, batch)[row]], dim=1)

    def flops(self, batch: Batch) -> int:
        """Floating-point operations of forward and backward on the batch (see :mod:`model.flops`)."""
        return training_flops(self.config, self.net.vocabulary.size, batch, streams=2 if self.name == "flm" else 1)

    def parameter_group(self, name: str) -> str:
        """Learning-rate group of a parameter: head, cross or rest (specification section 7)."""
        if name.startswith(("lm_head", "itm_head")):
            return "head"
        cross = ("net.text_projection", "net.image_projection", "net.top", "net.reconstructor", "net.pooler")
        return "cross" if name.startswith(cross) else "rest"

    def decays(self, name: str, parameter: Tensor) -> bool:
        """Whether weight decay applies: matrices and embedding tables.

        # NOTE release: CLIP's LayerNorm scales and class embedding are decayed too; here: no vector is, as is usual.
        """
        return parameter.ndim > 1


def _mean_of_words(streams: list[tuple[Tensor, Tensor]], batch: Batch) -> Tensor:
    """Mean of the states of each row's words, fp32 [R, D], from streams ([N, D] states, int64 [N] flat positions)."""
    num_rows, num_positions = batch.text.shape
    total = batch.text.new_zeros((num_rows, streams[0][0].shape[1]), dtype=torch.float32)
    for states, index in streams:
        row, position = index // num_positions, index % num_positions
        is_word = (position >= 1) & (position < batch.lengths[row] - 1)
        total = total.index_add(0, row, states.float() * is_word[:, None])
    return total / (len(streams) * (batch.lengths - 2)).clamp(min=1)[:, None]
