"""Captions that both directions of FLM find probable: beams of the l2r stream, scored by the r2l stream too.

Legend: B images, N candidates of an image, P image tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.batch import Row
from model.decode.search import Decoder, alone, best_beams
from model.flm import FLM
from model.plans.both_ways import BothWaysPlanner

CANDIDATES_AT_ONCE = 4  # of each image in one pass, so that many beams need no more memory


class ScoreWeights(NamedTuple):
    """How much counts what the l2r stream, the r2l stream and the reconstructor say of a candidate."""

    l2r: float = 1.0
    r2l: float = 1.0
    reconstruction: float = 0.0


DEFAULT_WEIGHTS = ScoreWeights()


@torch.no_grad()
def both_ways(
    objective: nn.Module,
    decoder: Decoder,
    tokens: Tensor,
    max_tokens: int = 30,
    beams: int = 3,
    length_penalty: float = 1.0,
    weights: ScoreWeights = DEFAULT_WEIGHTS,
    all_agree: Callable[[bool], bool] = alone,
    min_tokens: int = 0,
    repetition_penalty: float = 1.0,
) -> list[list[int]]:
    """Of the ``beams`` best captions of an image by :func:`~model.decode.search.beam` the one with the highest

        (a log p_l2r(w) + b log p_r2l(w) + c log p_rec(w)) / length ** length_penalty

    where ``weights`` are (a, b, c); of equals the one that beam search ranks first. The length is that of beam search:
    it counts the prompt and the end token.

    * log p_l2r(w): of the words and the end from the words before, as beam search has it.
    * log p_r2l(w): of each word from those after it, `</s>` first. No stream predicts `<s>`, so this part does not say
      whether a caption may begin where it does: with ``length_penalty`` 0 it favours short ones.
    * log p_rec(w): pseudo log likelihood, of each word from all the others, by the reconstructor.

    Reranking candidates of one direction by the other: Liu, Utiyama, Finch, Sumita 2016, "Agreement on
    Target-Bidirectional Neural Machine Translation", NAACL-HLT. Pseudo log likelihood: Salazar, Liang, Nguyen,
    Kirchhoff 2020, "Masked Language Model Scoring", arXiv 1910.14659.

    # NOTE: beam search rules out tokens that no caption holds; in the other two parts they keep their probability.

    Ranks that share one network (ZeRO-3) may bring different numbers of images, with the same options: how many passes
    score the candidates follows from ``beams`` alone.

    Args:
        objective: in eval mode, one that ``check_both_ways`` lets pass.
        decoder: of :func:`~model.decode.stream.decoder_of` for the same images, not started.
        tokens: [B, P, D] of the images, as the network's ``encode`` gives them.
        max_tokens, beams, length_penalty, all_agree, min_tokens, repetition_penalty: of the beam search.

    Returns:
        As :func:`~model.decode.search.greedy`.

    Raises:
        ValueError: as beam search and ``check_both_ways``.
    """
    check_both_ways(objective, weights)
    found = best_beams(decoder, beams, max_tokens, beams, length_penalty, all_agree, min_tokens, repetition_penalty)
    captions = [[one.words for one in image] for image in found]
    others = other_log_probabilities(objective, tokens, captions, weights, len(decoder.prompt)).tolist()
    chosen = []
    for candidates, values in zip(found, others, strict=True):
        scores = []
        for (words, value), other in zip(candidates, values, strict=True):
            length = min(len(words) + 1, max_tokens)
            absent = value == float("-inf")
            scores.append(value if absent else weights.l2r * value + other / length**length_penalty)
        chosen.append(candidates[scores.index(max(scores))].words)
    return chosen


def other_log_probabilities(
    objective: nn.Module,
    tokens: Tensor,
    captions: Sequence[Sequence[Sequence[int]]],
    weights: ScoreWeights,
    num_prompt: int = 0,
) -> Tensor:
    """b log p_r2l + c log p_rec of N ``captions`` an image, fp32 [B, N]; the first ``num_prompt`` words are only read.

    A part of weight 0 is not computed.
    """
    parts = {"r2l": weights.r2l, "flm": weights.reconstruction}
    parts = {name: weight for name, weight in parts.items() if weight}
    count = len(captions[0])
    if not parts:
        return tokens.new_zeros((len(captions), count), dtype=torch.float32)
    planner = BothWaysPlanner(objective.net.vocabulary, 1 + num_prompt, tuple(parts))
    found = []
    for start in range(0, count, CANDIDATES_AT_ONCE):
        several = [candidates[start : start + CANDIDATES_AT_ONCE] for candidates in captions]
        found.append(_one_pass(objective, tokens, several, planner, parts))
    return torch.cat(found).view(count, len(captions)).T


def _one_pass(
    objective: nn.Module,
    tokens: Tensor,
    captions: Sequence[Sequence[Sequence[int]]],
    planner: BothWaysPlanner,
    parts: dict[str, float],
) -> Tensor:
    """As above of a few candidates, fp32 [N * B], the first of all images before the second: the first B rows read the
    images' keys and values without a copy."""
    net, vocabulary = objective.net, objective.net.vocabulary
    rows = [
        Row([vocabulary.bos_id, *words, vocabulary.eos_id], image, 0)
        for candidates in zip(*captions, strict=True)
        for image, words in enumerate(candidates)
    ]
    images = torch.zeros((len(captions), 1), dtype=torch.uint8)  # a plan asks for their number only
    batch = planner(images, rows).to(tokens.device)
    plan = batch.plan
    output, index = net.fuse(plan, tokens), {"r2l": plan.r2l_index, "flm": plan.query_index}
    states, targets, row, weight = [], [], [], []
    for name, term in batch.terms.items():
        states.append(getattr(output, term.source).index_select(0, term.position))
        targets.append(term.target)
        row.append(index[name].index_select(0, term.position) // plan.text.shape[1])
        weight.append(tokens.new_full((len(term.target),), parts[name], dtype=torch.float32))
    losses, _ = objective.lm_head(torch.cat(states), torch.cat(targets))
    total = tokens.new_zeros(len(rows), dtype=torch.float32)
    return total.index_add(0, torch.cat(row), -torch.cat(weight) * losses)


def check_both_ways(objective: nn.Module, weights: ScoreWeights) -> None:
    """Raises ValueError for a network that does not have what ``weights`` ask for; one line."""
    net = objective.net
    if getattr(net, "released", False):
        raise ValueError("decoding both_ways has no released behaviour; use beam")
    if not isinstance(net, FLM):
        raise ValueError(
            f"decoding both_ways needs the r2l stream of FLM, this model of {objective.name} has none; use beam, or"
            " fine-tune FLM on captioning with --task.r2l_weight 1"
        )
    if weights.reconstruction and not [*net.reconstructor_bottom, *net.reconstructor_top]:
        raise ValueError(
            f"reconstruction_score_weight is {weights.reconstruction:g}, this model of {objective.name} has no"
            " reconstructor; use 0, or fine-tune with --task.reconstruction_weight 1"
        )
