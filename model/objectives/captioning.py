"""The objective captioning: each word of an image's caption from the words before it, or also from those after."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from model.batch import Batch, Planner
from model.config import ModelConfig, ObjectiveOptions, Vocabulary
from model.flm import FLM
from model.flops import forward_macs, training_flops
from model.heads import LanguageModelHead
from model.layers import initial_std
from model.learning_rate_groups import declared_group
from model.objectives.pretraining import token_losses
from model.objectives.self_critical import Critic
from model.one_stream import OneStream
from model.plans.both_ways import BothWaysPlanner
from model.plans.captions import ADDED_TOKENS, CaptionPlanner, ReleasedCaptionPlanner, caption_form

RELEASED_WEIGHT = 0.5  # of the release's caption loss


class Captioning(nn.Module):
    """Next-token loss (term ``caption``) on the l2r stream of a network pretrained by any objective.

    That stream is the same in all of them: FLM's l2r states, AR's, PrefixLM's and MLM's with an empty prefix. So the
    network is one causal stream, and of FLM's weights the reconstructor and the r2l type are left out (``not_read``):
    captioning costs what AR costs. Released behaviour writes captions with two tokens of its own and, for the objective
    flm, computes the release's loss, which leaks (:class:`~model.plans.captions.ReleasedCaptionPlanner`); for any other
    it computes the same loss from l2r states, which is sound.

    With ``self_critical`` it trains by the ``critic`` that the caller sets (term ``self_critical``) and scores captions
    by the next-token loss all the same.

    With ``r2l_weight`` the network is FLM with both streams, and the r2l stream learns each word from those after it
    (term ``r2l``), by which :func:`model.decode.both_ways.both_ways` can choose. With ``reconstruction_weight`` the
    reconstructor is kept and learns too (term ``flm``), spans hidden as in pretraining. Weights are beside the 1 of
    ``caption``.
    """

    name = "captioning"
    critic: Critic | None = None

    def __init__(
        self,
        model: ModelConfig,
        objective: ObjectiveOptions,
        vocabulary: Vocabulary,
        max_text_length: int,
        self_critical: bool = False,
        r2l_weight: float = 0.0,
        reconstruction_weight: float = 0.0,
    ) -> None:
        """``objective``: what the network was pretrained by; ``vocabulary`` is the tokenizer's.

        Raises:
            ValueError: ``self_critical`` with released behaviour, or weights of a direction that is not there.
        """
        super().__init__()
        released = model.behaviour == "released"
        if self_critical and released:
            raise ValueError("task.self_critical has no released behaviour; use model.behaviour default")
        weights = {"r2l": r2l_weight, "flm": reconstruction_weight}
        self.directions = {name: weight for name, weight in weights.items() if weight}  # beside that of captioning
        if self.directions:
            _check_directions(objective.name, released, self_critical)
            model = model if reconstruction_weight else _without_reconstructor(model)
        self.config, self.self_critical = model, self_critical
        self.form = caption_form(vocabulary, released)
        leaks = released and objective.name == "flm"
        vocabulary = self.form.vocabulary
        if self.directions:
            self.net = FLM(model, vocabulary)
            self._spans = objective.corruption_rate, objective.span_placement == "centred"
        else:
            self.net = FLM(model, vocabulary) if leaks else OneStream(model, vocabulary, causal=True)
        self.lm_head = LanguageModelHead(model.text.width, vocabulary.size)
        self._leak = (objective.corruption_rate, max_text_length) if leaks else None
        weight = RELEASED_WEIGHT if released else 1.0
        self.term_weights = {"self_critical": 1.0} if self_critical else {"caption": weight, **self.directions}
        unread = [] if leaks or self.directions else [r"net\.stream_embedding\.weight"]
        unread += [] if leaks or reconstruction_weight else [r"net\.reconstructor_(bottom|top)\..+"]
        self.not_read = tuple(unread)
        grown = r"net\.embedding\.word\.weight|lm_head\.(weight|bias)"
        self.resizes = ((grown, with_added_tokens),) if released else ()

    def planner(self, num_prompt: int = 0) -> Planner:
        """The planner of captions whose first ``num_prompt`` words are read, not predicted."""
        num_read = 1 + len(self.form.begin) + num_prompt
        if self._leak is not None:
            return ReleasedCaptionPlanner(self.form.vocabulary, num_read, *self._leak)
        if self.directions:
            return BothWaysPlanner(self.form.vocabulary, num_read, ("caption", *self.directions), *self._spans)
        return CaptionPlanner(self.form.vocabulary, num_read, first_state=int(self.net.released))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Sum of losses of each term, fp32 scalars with gradient."""
        if self.self_critical:
            return {"self_critical": self.critic.loss(self, batch)}
        return {name: losses.sum() for name, (losses, _) in self._losses(batch).items()}

    @torch.no_grad()
    def score(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """(sum of losses, number of correct predictions) of each term, fp32 scalars."""
        return {name: (losses.sum(), correct.float().sum()) for name, (losses, correct) in self._losses(batch).items()}

    def _losses(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        return token_losses(self.lm_head, self.net(batch), batch.terms)

    def flops(self, batch: Batch) -> int:
        """Floating-point operations of forward and backward on the batch (see :mod:`model.flops`); 0 of a self-critical
        batch, as its captions are not known before."""
        if batch.plan is None:
            return 0
        streams = 2 if isinstance(self.net, FLM) else 1
        macs = forward_macs(self.config, self.net.vision, self.net.vocabulary.size, batch, streams)
        return training_flops(self.config, macs)

    def parameter_group(self, name: str) -> str:
        """Learning-rate group of a parameter, as its module declares it (specification section 7)."""
        return declared_group(self, name)

    def decays(self, name: str, parameter: Tensor) -> bool:
        """Whether weight decay applies: matrices and embedding tables."""
        return parameter.ndim > 1


def _check_directions(objective: str, released: bool, self_critical: bool) -> None:
    """Raises ValueError for a captioner whose r2l stream can't learn."""
    if objective != "flm":
        raise ValueError(
            f"task.r2l_weight is for objective.name flm, found {objective}, which has no r2l stream; use 0"
        )
    if released:
        raise ValueError("task.r2l_weight has no released behaviour; use model.behaviour default")
    if self_critical:
        raise ValueError("task.r2l_weight is not for task.self_critical, which trains the l2r stream alone; use 0")


def _without_reconstructor(model: ModelConfig) -> ModelConfig:
    return replace(model, reconstructor=replace(model.reconstructor, bottom_layers=0, top_layers=0))


def with_added_tokens(table: Tensor, shape: torch.Size) -> Tensor:
    """A table with a row per token, grown by rows for the release's two: N(0, 0.02) at width 768, zeros of a bias."""
    if shape[0] != len(table) + ADDED_TOKENS or table.shape[1:] != shape[1:]:
        return table
    added = table.new_zeros(ADDED_TOKENS, *shape[1:])
    return torch.cat([table, added.normal_(std=initial_std(shape[1])) if added.ndim > 1 else added])
