"""Fine-tuning by classification: an answer, or a statement's truth, from the CLS features of a text with its images.

Legend: M texts, I images of each, D width, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.batch import Batch, Term
from model.config import ModelConfig, ObjectiveOptions
from model.flops import network_macs, training_flops
from model.heads import ClassifierHead
from model.learning_rate_groups import declared_group
from model.objectives.parts import Parts
from model.plans.tasks import ClassKind, ClassPlanner

HEADS = {"vqa": "answer_head", "nlvr2": "pair_head", "snli_ve": "entailment_head"}  # of a term, as checkpoints name it


class Classification(nn.Module):
    """The network of a pretraining objective with a classifier on its pooled CLS features (specification section 7).

    The loss is the cross entropy of a class, or, of soft targets, the binary cross entropy summed over the classes.
    """

    def __init__(
        self,
        model: ModelConfig,
        objective: ObjectiveOptions,
        parts: Parts,
        term: str,
        num_classes: int,
        num_images: int = 1,
        kind: ClassKind = "class",
    ) -> None:
        """``term`` names the loss; its head is the one that HEADS names, or ``TERM_head``."""
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"{term} has {num_classes} classes, expected at least 2")
        self.config, self.name = model, objective.name
        self.net, self.term, self.num_images = parts.net, term, num_images
        self.planner = ClassPlanner(parts.planner, term, num_classes, num_images, kind)
        self.term_weights = {term: 1.0}
        self._head = HEADS.get(term, f"{term}_head")
        setattr(self, self._head, ClassifierHead(model.text.width, num_classes, num_images))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Sum of losses over the known targets, a fp32 scalar with gradient."""
        term = batch.terms[self.term]
        return {self.term: _losses(self._logits(batch, term), term)[0].sum()}

    @torch.no_grad()
    def score(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """(sum of losses, number of correct predictions) over the known targets, fp32 scalars; of soft targets the
        score of the largest logit's class counts.
        """
        return self.judge(batch)[1]

    @torch.no_grad()
    def logits(self, batch: Batch, tokens: Tensor | None = None) -> Tensor:
        """fp32 [M, C] of all texts of the batch, known target or not, in the order of their rows; ``tokens``
        [B*I, P, D] of the images, where they are encoded already."""
        return self._logits(batch, batch.terms["read"], tokens)

    @torch.no_grad()
    def judge(self, batch: Batch) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """``logits`` and ``score`` by one pass of the network."""
        read, term = batch.terms["read"], batch.terms[self.term]
        logits = self._logits(batch, read)
        known = torch.searchsorted(read.position[:, 0].contiguous(), term.position[:, 0].contiguous())
        losses, correct = _losses(logits.index_select(0, known), term)
        return logits, {self.term: (losses.sum(), correct.sum())}

    def samples(self, batch: Batch) -> Tensor:
        """int64 [M]: which sample of the batch each text of ``logits`` belongs to."""
        return batch.plan.image_of_row[batch.terms["read"].target] // self.num_images

    def _logits(self, batch: Batch, term: Term, tokens: Tensor | None = None) -> Tensor:
        output = self.net(batch) if tokens is None else self.net.fuse(batch.plan, tokens)
        states = getattr(output, term.source).index_select(0, term.position.flatten())
        features = self.net.pooler(states).unflatten(0, (-1, self.num_images)).flatten(1)  # [M, I*D]
        return self.get_submodule(self._head)(features).float()

    def flops(self, batch: Batch) -> int:
        """Floating-point operations of forward and backward on the batch (see :mod:`model.flops`)."""
        macs = network_macs(self.config, self.net.vision, batch, streams=2 if self.name == "flm" else 1)
        linears = [part for part in self.get_submodule(self._head) if isinstance(part, nn.Linear)]
        head = sum(linear.in_features * linear.out_features for linear in linears)
        pooler = self.num_images * self.config.text.width**2
        return training_flops(self.config, macs | {"head": batch.counts[self.term] * (pooler + head)})

    def parameter_group(self, name: str) -> str:
        """Learning-rate group of a parameter, as its module declares it (specification section 7)."""
        return declared_group(self, name)

    def decays(self, name: str, parameter: Tensor) -> bool:
        """Whether weight decay applies: matrices and embedding tables (NOTEs in ``Pretraining.decays``).

        # NOTE release: the LayerNorm scale of a classifier is decayed; here: no vector is.
        """
        return parameter.ndim > 1


def _losses(logits: Tensor, term: Term) -> tuple[Tensor, Tensor]:
    """Loss and correctness of every target, fp32 [M] both."""
    chosen = logits.argmax(1)
    if term.kind == "class":
        return F.cross_entropy(logits, term.target, reduction="none"), (chosen == term.target).float()
    losses = F.binary_cross_entropy_with_logits(logits, term.target, reduction="none").sum(1)
    return losses, term.target.gather(1, chosen[:, None]).squeeze(1)
