"""Self-critical training: captions that the model samples itself, each trained by how much it is worth.

Legend: B images, M captions (one a pair), N words of a caption at most, P image tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from model.batch import Batch, Row, Term
from model.decode.likelihood import log_probabilities
from model.decode.search import greedy, nucleus
from model.decode.stream import decoder_of
from model.plans.builder import row_generator
from model.towers import encode_images

Words = Sequence[int]
# What captions are worth, given their words and those of their images' references, as token ids. One that ended has
# `</s>` as its last word, one that was cut off has not.
Reward = Callable[[Sequence[Words], Sequence[Sequence[Words]]], Sequence[float]]
MAX_TOKENS = 30  # words of a sampled caption, prompt included
DRAW = 1  # stream of a row's generator


@dataclass(frozen=True)
class SelfCriticalPlanner:
    """A term ``self_critical`` with a caption to sample for each pair; its target are N uniforms that decide the words.

    ``Row.target`` of a pair holds the image's references, lists of token ids that end in ``</s>``. They stand in the
    term ``references`` one after another, ``position`` being the number of their caption.
    """

    max_tokens: int = MAX_TOKENS

    def __call__(self, images: Tensor, rows: list[Row]) -> Batch:
        """images uint8 [B, I, 3, H, W]; of several pairs on an image the first counts."""
        pairs = list({row.image: row for row in reversed(rows) if row.role == "pair"}.values())[::-1]
        words = [np.concatenate(row.target).astype(np.int64) for row in pairs]
        draws = [row_generator(row.seed, DRAW).random(self.max_tokens) for row in pairs]
        caption = np.repeat(np.arange(len(pairs)), [len(one) for one in words])
        nothing = np.zeros(0, dtype=np.int64)
        terms = {
            "self_critical": Term(
                "l2r",
                torch.tensor([row.image for row in pairs], dtype=torch.int64),
                torch.from_numpy(np.array(draws, dtype=np.float64).reshape(-1, self.max_tokens)),
                "soft",
            ),
            "references": Term(
                "l2r", torch.from_numpy(caption), torch.from_numpy(np.concatenate([nothing, *words])), "feature"
            ),
        }
        return Batch(images, terms)


@dataclass(frozen=True)
class Critic:
    """REINFORCE with the greedy caption as baseline (Rennie, Marcheret, Mroueh, Ross, Goel 2017, arXiv 1612.00563).

    Loss of a sampled caption w: -(r(w) - r(greedy)) log p(w), where p(w) has the end of the caption in it, unless the
    caption was cut. Its gradient is that of -E[r] on average. Both captions are searched for in evaluation mode, in
    ``max_tokens`` steps whatever is found, so that ranks that share one network stay in step.

    # NOTE: tokens that no caption holds are never drawn but have their place in p(w); they have next to no probability.
    """

    reward: Reward
    prompt: Sequence[int] = ()
    max_tokens: int = MAX_TOKENS

    def loss(self, objective: nn.Module, batch: Batch) -> Tensor:
        """Sum over the captions, an fp32 scalar with gradient; ``objective`` as of :func:`decoder_of`."""
        term, end = batch.terms["self_critical"], objective.net.vocabulary.eos_id
        tokens = encode_images(objective.net, batch.images)  # [B, P, D]; unusable ones too, so that there is one
        uniforms = term.target.new_zeros(len(tokens), self.max_tokens).index_copy(0, term.position, term.target)
        never = lambda done: False  # noqa: E731
        with _evaluating(objective):
            decoder = lambda: decoder_of(objective, batch.images, self.prompt, tokens.detach())  # noqa: E731
            sampled = nucleus(decoder(), self.max_tokens, uniforms, top_p=1.0, all_agree=never)
            baseline = greedy(decoder(), self.max_tokens, never)
        likelihood = log_probabilities(objective, tokens, sampled, self.max_tokens, len(self.prompt))
        places = term.position.tolist()
        written = [
            [*words[len(self.prompt) :], *([end] if len(words) < self.max_tokens else [])]
            for words in (*(sampled[place] for place in places), *(baseline[place] for place in places))
        ]
        worth = torch.tensor(self.reward(written, _references(batch.terms["references"], len(places), end) * 2))
        advantage = (worth[: len(places)] - worth[len(places) :]).to(likelihood)
        return -(advantage * likelihood.index_select(0, term.position)).sum()


def _references(term: Term, count: int, end: int) -> list[list[list[int]]]:
    """The references of each of ``count`` captions, lists of ids that end in ``end``."""
    found: list[list[list[int]]] = [[] for _ in range(count)]
    words: list[int] = []
    for caption, word in zip(term.position.tolist(), term.target.tolist(), strict=True):
        words.append(word)
        if word == end:
            found[caption].append(words)
            words = []
    return found


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode; training mode restored after."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
