"""Fine-tuning for retrieval: the right text of an image, or image of a text, is to score highest among candidates.

Legend: M rankings, C candidates of each, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.batch import Batch, Term
from model.config import ModelConfig, ObjectiveOptions
from model.flops import network_macs, training_flops
from model.heads import RankHead
from model.learning_rate_groups import declared_group
from model.objectives.parts import Parts
from model.plans.ranking import MISSING, CandidatePlanner, InBatchPlanner


class Ranking(nn.Module):
    """The network of a pretraining objective with one number on its pooled CLS feature (specification section 7.4).

    The loss of a ranking is the cross entropy of its candidates' scores, the right one first.
    """

    def __init__(
        self, model: ModelConfig, objective: ObjectiveOptions, parts: Parts, in_batch_negatives: int | None = None
    ) -> None:
        """Candidates are the texts that come with each image, or of the micro-batch so many pairs."""
        super().__init__()
        self.config, self.name = model, objective.name
        self.net = parts.net
        self.rank_head = RankHead(model.text.width)
        self.reading_planner = parts.planner  # of texts by themselves
        if in_batch_negatives is None:
            self.planner, self.term_weights = CandidatePlanner(parts.planner), {"i2t": 1.0}
        else:
            self.planner = InBatchPlanner(parts.planner, in_batch_negatives)
            self.term_weights = {"i2t": 0.5, "t2i": 0.5}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Sum of losses of each term, fp32 scalars with gradient."""
        scores = self.scores(batch)
        return {name: F.cross_entropy(each, batch.terms[name].target, reduction="sum") for name, each in scores.items()}

    @torch.no_grad()
    def score(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """(sum of losses, number of rankings whose right candidate scores above all others), fp32 scalars."""
        found = {}
        for name, scores in self.scores(batch).items():
            others = F.pad(scores[:, 1:], (0, 1), value=float("-inf")).amax(1)
            losses = F.cross_entropy(scores, batch.terms[name].target, reduction="sum")
            found[name] = losses, (scores[:, 0] > others).float().sum()
        return found

    def scores(self, batch: Batch) -> dict[str, Tensor]:
        """Scores of the candidates of each term, fp32 [M, C] with gradient; -inf where a ranking has fewer."""
        output = self.net(batch)
        return {name: self._scores(getattr(output, term.source), term) for name, term in batch.terms.items()}

    def _scores(self, states: Tensor, term: Term) -> Tensor:
        features = states.index_select(0, term.position.clamp(min=0).flatten())
        scores = self.match(features).view(term.position.shape)
        return scores.masked_fill(term.position == MISSING, float("-inf"))

    def match(self, features: Tensor) -> Tensor:
        """Scores fp32 [M] of CLS features [M, D]."""
        return self.rank_head(self.net.pooler(features)).float().squeeze(1)

    def flops(self, batch: Batch) -> int:
        """Floating-point operations of forward and backward on the batch (see :mod:`model.flops`)."""
        macs = network_macs(self.config, self.net.vision, batch, streams=2 if self.name == "flm" else 1)
        candidates, width = sum(term.position.numel() for term in batch.terms.values()), self.config.text.width
        return training_flops(self.config, macs | {"head": candidates * (width + 1) * width})

    def parameter_group(self, name: str) -> str:
        """Learning-rate group of a parameter, as its module declares it (specification section 7)."""
        return declared_group(self, name)

    def decays(self, name: str, parameter: Tensor) -> bool:
        """Whether weight decay applies: matrices and embedding tables (NOTEs in ``Pretraining.decays``)."""
        return parameter.ndim > 1
