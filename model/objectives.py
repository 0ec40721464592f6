"""Pretraining objectives: net + loss, returning the sum of losses per term; counts are known from the batch.

Legend: M targets of a term, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.batch import Batch, Planner
from model.config import ModelConfig, ObjectiveConfig, Vocabulary
from model.flm import FLM, Features
from model.flops import training_flops
from model.heads import LanguageModelHead
from model.plan import FLMPlanner, ReleasedPlanner


class FLMPretraining(nn.Module):
    """Reconstruction of all words, the two language-model losses, and image-text matching for the CLS query.

    Total = (flm + a l2r + b r2l) / (1 + a + b) + c itm, each a mean over its targets (specification section 5);
    ``term_weights`` holds these factors, the mean over all ranks is taken by the caller.
    """

    def __init__(self, model: ModelConfig, objective: ObjectiveConfig, vocabulary: Vocabulary, max_text_length: int):
        super().__init__()
        self.config = model
        self.net = FLM(model, vocabulary)
        self.lm_head = LanguageModelHead(model.text.width, vocabulary.size)
        nn.init.normal_(self.lm_head.transform.weight, std=0.02)
        nn.init.zeros_(self.lm_head.transform.bias)
        total = 1 + objective.l2r_weight + objective.r2l_weight
        self.term_weights = {
            "flm": 1 / total,
            "l2r": objective.l2r_weight / total,
            "r2l": objective.r2l_weight / total,
        }
        self.planner: Planner
        if model.behaviour == "released":
            self.planner = ReleasedPlanner(vocabulary, objective.corruption_rate, max_text_length)
        else:
            self.term_weights["itm"] = objective.itm_weight
            share = objective.negative_share if objective.itm_weight else 0.0
            self.planner = FLMPlanner(vocabulary, objective.corruption_rate, share)
            self.itm_head = nn.Linear(model.text.width, 2)
            nn.init.normal_(self.itm_head.weight, std=0.02)
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
        features = self.net(batch)
        language = {name: term for name, term in batch.terms.items() if name != "itm"}
        selected = [self._features_of(features, name)[term.position] for name, term in language.items()]
        labels = torch.cat([term.label for term in language.values()])
        losses, correct = self.lm_head(torch.cat(selected), labels)
        sizes = [term.label.shape[0] for term in language.values()]
        results = dict(zip(language, zip(losses.split(sizes), correct.split(sizes), strict=True), strict=True))
        if "itm" in batch.terms:
            results["itm"] = self._match(features, batch)
        return results

    def _features_of(self, features: Features, term: str) -> Tensor:
        return {"flm": features.queries, "l2r": features.l2r, "r2l": features.r2l}[term]

    def _match(self, features: Features, batch: Batch) -> tuple[Tensor, Tensor]:
        position, label = batch.terms["itm"]
        logits = self.itm_head(self.net.pooler(features.queries[position])).float()
        return F.cross_entropy(logits, label, reduction="none"), logits.argmax(1) == label

    def flops(self, batch: Batch) -> int:
        """Floating-point operations of forward and backward on the batch (see :mod:`model.flops`)."""
        return training_flops(self.config, self.net.vocabulary.size, batch)

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
