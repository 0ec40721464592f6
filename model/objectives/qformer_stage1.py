"""The objective of a Q-Former's first stage: contrast, matching and writing of texts, all through its queries.

Li et al. 2023, "BLIP-2" (arXiv 2301.12597), section 3.2. Legend: P pairs, Q queries, D width, C contrasted pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.batch import Batch
from model.config import QFormerStage1Options
from model.heads import LanguageModelHead, MatchingHead
from model.learning_rate_groups import declared_group
from model.objectives.contrast import PooledSimilarity, contrast, scale
from model.plans.image_text import ImageTextPlanner
from model.qformer import Pairs, QFormerPairs


class QFormerStage1(nn.Module):
    """Image-text contrast (``itc``), matching (``itm``) and image-grounded text generation (``itg``).

    Wrong pairs are those of the micro-batch, of this rank: the loss depends on its size and not on the number of ranks.
    # NOTE BLIP-2's release: wrong pairs of all ranks, and smoothed labels; here: of the micro-batch, and as they are.
    """

    name = "qformer_stage1"

    def __init__(self, net: QFormerPairs, options: QFormerStage1Options) -> None:
        super().__init__()
        width = net.connector.config.width
        self.net, self.planner = net, ImageTextPlanner(net.vocabulary)
        self.similarity = NearestQuery(width, options.embedding_width)
        self.itm_head = MatchingHead(width)
        self.lm_head = LanguageModelHead(width, net.vocabulary.size)
        self.term_weights = {"itc": options.itc_weight, "itm": options.itm_weight, "itg": options.itg_weight}

    @torch.no_grad()
    def begin_with(self, images: Tensor, fresh: bool) -> None:
        """As of :class:`model.objectives.evlgen.ImageToText`; there is no last layer here."""
        if fresh and self.net.connector.config.standardise:
            self.net.connector.norm.standardise(self.net.features(images))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Sum of losses of each term, fp32 scalars with gradient."""
        return {name: losses.sum() for name, (losses, _) in self._losses(batch).items()}

    @torch.no_grad()
    def score(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """(sum of losses, number of correct predictions) of each term, fp32 scalars; of ``itc`` the mean both ways."""
        return {name: (losses.sum(), correct.float().sum()) for name, (losses, correct) in self._losses(batch).items()}

    def _losses(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        pairs, words, contrasted = self.net(batch), batch.terms["itg"], batch.terms["itc"].position
        scores = self.similarity(pairs.queries, pairs.first)
        return {
            "itc": contrast(*(table.index_select(0, contrasted) for table in (scores.T, batch.plan.apart)), contrasted),
            "itm": self._match(pairs, batch, scores.detach()),
            "itg": self.lm_head(pairs.words.index_select(0, words.position), words.target),
        }

    def _match(self, pairs: Pairs, batch: Batch, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Two logits of each query, their mean over queries, for right pairs and two wrong ones of each."""
        contrasted, target = batch.terms["itc"].position, batch.terms["itm"].target
        texts, images = wrong_pairs(scores, batch.plan.apart, batch.plan.draws)
        of_images = torch.cat([contrasted, contrasted, images.index_select(0, contrasted)])
        of_texts = torch.cat([contrasted, texts.index_select(0, contrasted), contrasted])
        logits = self.itm_head(self.net.match(pairs, batch, of_images, of_texts)).float().mean(1)
        return F.cross_entropy(logits, target, reduction="none"), logits.argmax(1) == target

    def flops(self, batch: Batch) -> int:
        """Floating-point operations of forward and backward on the batch (see :mod:`model.flops`)."""
        net, plan, num_images = self.net, batch.plan, len(batch.images)
        connector, (num_texts, length) = net.connector, plan.text.shape
        tokens, body = connector.num_image_tokens, connector.body
        trained = any(parameter.requires_grad for parameter in net.vision.parameters())
        tower = 0 if batch.images.ndim == 4 else num_images * net.vision.macs
        width, num_words = connector.config.width, len(batch.terms["itg"].target)
        macs = num_images * tokens * connector.input.weight.numel()
        macs += num_texts * body.macs(tokens, 2 * length)
        macs += len(batch.terms["itm"].target) * body.macs(tokens, length)
        macs += num_texts * (len(body.queries) + 1) * self.similarity.image_projection.weight.numel()
        macs += num_texts**2 * len(body.queries) * self.similarity.image_projection.out_features
        macs += num_words * (width**2 + self.lm_head.weight.numel())
        return 6 * macs + (6 if trained else 2) * tower

    def parameter_group(self, name: str) -> str:
        """Learning-rate group of a parameter, as its module declares it."""
        return declared_group(self, name)

    def decays(self, name: str, parameter: Tensor) -> bool:
        """Whether weight decay applies: matrices and tables."""
        return parameter.ndim > 1


class NearestQuery(PooledSimilarity):
    """Scores of all images and texts: cosine of a text and of the query that is nearest to it, over a temperature."""

    def forward(self, queries: Tensor, first: Tensor) -> Tensor:
        """[P, Q, D], [P, D] -> fp32 [P, P], rows are images."""
        images, texts = self.embed_images(queries), self.embed_texts(first)
        nearest = (images.flatten(0, 1) @ texts.T).unflatten(0, images.shape[:2]).amax(1)
        return nearest * scale(self.log_scale)


def wrong_pairs(scores: Tensor, apart: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """A wrong text of each image and a wrong image of each text, int64 [P] both.

    Drawn from the softmax of the scores over wrong pairs, by the largest score with a Gumbel variable added (Li et al.
    2021, "ALBEF", section 3.2, for the distribution). ``draws`` fp32 [2, P, P] are uniform. Where no pair is wrong it
    is any.
    """
    noise = -torch.log(-torch.log(draws.float()))
    found = [
        (table + one).masked_fill(~apart, float("-inf")).argmax(1)
        for table, one in zip((scores, scores.T), noise, strict=True)
    ]
    return found[0], found[1]
