"""Captions chosen by both directions of FLM: scores against one word at a time, the choice against all candidates."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from model.batch import Row
from model.build import build_captioning
from model.config import objective_options
from model.decode import both_ways as module
from model.decode.both_ways import ScoreWeights, both_ways, check_both_ways, other_log_probabilities
from model.decode.search import beam, best_beams
from model.decode.stream import decoder_of
from model.objectives.pretraining import Pretraining
from model.plans.flm import FLMPlanner
from tests.rounding import TINY
from tests.tiny_flm import MAX_TEXT_LENGTH, VOCABULARY, captioner, images, tiny_config

MAX_TOKENS = 8
CAPTIONS = [[[7, 9, 4], [], [3, 3, 8, 11, 12, 5]], [[5], [6, 7], [20, 21, 22, 23]]]


def log_p_of_word(objective: Pretraining, picture: Tensor, words: list[int], number: int, how: str) -> float:
    """Log probability of word ``number`` of a caption, with other words where nothing may be seen.

    ``how`` r2l: the words before it are hidden so and itself; flm: itself.
    """
    shown = [17 if how == "r2l" and k <= number or k == number else word for k, word in enumerate(words)]
    row = Row([VOCABULARY.bos_id, *shown, VOCABULARY.eos_id], 0, 0)
    batch = FLMPlanner(VOCABULARY, corruption_rate=0.0, negative_share=0.0)(picture, [row])
    term = batch.terms[how]
    states = getattr(objective.net(batch), term.source)[term.position]
    logits = objective.lm_head.logits(states)[number]
    return float(logits.log_softmax(-1)[words[number]])


@torch.no_grad()
def test_scores_are_those_of_one_word_at_a_time() -> None:
    objective, pictures = captioner(), images(2, seed=3)
    tokens = objective.net.encode(pictures)
    for weights, prompt in ((ScoreWeights(1, 1, 0), 0), (ScoreWeights(1, 0, 1), 0), (ScoreWeights(0, 0.5, 2), 1)):
        captions = CAPTIONS if prompt == 0 else [[[7, *words] for words in image] for image in CAPTIONS]
        found = other_log_probabilities(objective, tokens, captions, weights, prompt)
        for image, candidates in enumerate(captions):
            for number, words in enumerate(candidates):
                expected = sum(
                    weight * log_p_of_word(objective, pictures[image : image + 1], words, place, how)
                    for how, weight in (("r2l", weights.r2l), ("flm", weights.reconstruction))
                    for place in range(prompt, len(words))
                    if weight
                )
                assert float(found[image, number]) == pytest.approx(expected, abs=40 * (1 + len(words)) * TINY)


@pytest.mark.parametrize("penalty", [0.0, 1.0])
@pytest.mark.parametrize("weights", [ScoreWeights(1, 1, 0), ScoreWeights(0.2, 1, 1), ScoreWeights(0, 0, 1)])
@torch.no_grad()
def test_the_best_of_all_candidates_is_taken(weights: ScoreWeights, penalty: float) -> None:
    objective, pictures, others = captioner(), images(5, seed=2), 0
    for number in range(5):
        picture = pictures[number : number + 1]
        tokens = objective.net.encode(picture)
        decoder = lambda picture=picture: decoder_of(objective, picture)  # noqa: E731
        [candidates] = best_beams(decoder(), 6, MAX_TOKENS, 6, penalty)
        values = []
        for words, value in candidates:
            length = min(len(words) + 1, MAX_TOKENS)
            rest = float(other_log_probabilities(objective, tokens, [[words]], weights)[0, 0])
            values.append(weights.l2r * value + rest / length**penalty)
        best = candidates[values.index(max(values))].words
        assert both_ways(objective, decoder(), tokens, MAX_TOKENS, 6, penalty, weights) == [best]
        others += best != candidates[0].words
    assert others, "else nothing would be tested"


@torch.no_grad()
def test_the_forward_stream_alone_gives_what_beam_search_gives() -> None:
    for prompt in ([], [36]):
        objective, pictures = captioner(), images(5, seed=2)
        tokens = objective.net.encode(pictures)
        for beams, penalty in ((1, 1.0), (4, 1.0), (7, 0.0)):
            decoder = lambda: decoder_of(objective, pictures, prompt)  # noqa: E731, B023
            found = both_ways(objective, decoder(), tokens, MAX_TOKENS, beams, penalty, ScoreWeights(1, 0, 0))
            assert found == beam(decoder(), MAX_TOKENS, beams, penalty)


@torch.no_grad()
def test_many_beams_are_scored_in_passes_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many passes for any number of images: ranks that share a network stay in step (invariant 5: same captions)."""
    objective, pictures, passes = captioner(), images(4, seed=2), []
    fuse = objective.net.fuse
    monkeypatch.setattr(objective.net, "fuse", lambda plan, tokens: passes.append(len(plan.text)) or fuse(plan, tokens))

    def captions(chosen: slice) -> list[list[int]]:
        tokens = objective.net.encode(pictures[chosen])
        return both_ways(objective, decoder_of(objective, pictures[chosen]), tokens, MAX_TOKENS, 10)

    whole = captions(slice(0, 4))
    assert passes == [16, 16, 8]
    assert [captions(slice(n, n + 1))[0] for n in range(4)] == whole and passes[3:6] == [4, 4, 2]
    monkeypatch.setattr(module, "CANDIDATES_AT_ONCE", 1)
    assert captions(slice(0, 4)) == whole


@torch.no_grad()
def test_fewer_candidates_than_beams() -> None:
    """One word may follow: what is not there is never chosen."""
    objective, pictures = captioner(), images(2, seed=2)
    tokens = objective.net.encode(pictures)
    found = best_beams(decoder_of(objective, pictures), 70, 1, 70)
    assert [sum(math.isfinite(one.value) for one in image) for image in found] == [58, 58]  # 57 words, none at all
    chosen = both_ways(objective, decoder_of(objective, pictures), tokens, 1, 70, weights=ScoreWeights(0, 1, 0))
    for words, candidates in zip(chosen, found, strict=True):
        assert words in [one.words for one in candidates if math.isfinite(one.value)]


def test_models_without_both_directions_are_refused() -> None:
    sizes = (objective_options("flm"), VOCABULARY, MAX_TEXT_LENGTH)
    one_way = build_captioning(tiny_config(), *sizes)
    for objective in (one_way, captioner(name="ar")):
        with pytest.raises(ValueError, match="needs the r2l stream of FLM, this model of .* has none"):
            check_both_ways(objective, ScoreWeights())
    with pytest.raises(ValueError, match="both_ways has no released behaviour"):
        check_both_ways(captioner("released"), ScoreWeights())
    without = build_captioning(tiny_config(), *sizes, r2l_weight=1.0)
    check_both_ways(without, ScoreWeights())
    with pytest.raises(ValueError, match="reconstruction_score_weight is 1, this model of captioning has no"):
        check_both_ways(without, ScoreWeights(1, 1, 1))
    check_both_ways(build_captioning(tiny_config(), *sizes, False, 1.0, 0.5), ScoreWeights(1, 1, 1))
