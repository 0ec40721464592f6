"""Cached decoding against the network run as a whole, and beam search against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch

from model.batch import Row
from model.decode.search import CachedStream, beam, greedy
from tests.tiny_flm import VOCABULARY, caption, images, tiny_flm


def whole_run_logits(objective, picture: torch.Tensor, words: list[int]) -> torch.Tensor:
    """Logits of the token after ``words``, from one uncached pass over the sentence."""
    batch = objective.planner(picture, [Row([0, *words, 2], 0, 0)])
    state = objective.net(batch).l2r[len(words)]
    return objective.lm_head.logits(state[None])[0]


@torch.no_grad()
def test_cached_states_equal_the_whole_run():
    objective, pictures = tiny_flm(), images(2)
    captions = [caption(6, seed) for seed in (1, 2)]
    batch = objective.planner(pictures, [Row(ids, number, 0) for number, ids in enumerate(captions)])
    whole = objective.net(batch).l2r
    stream = CachedStream(objective.net, pictures)
    for position in range(7):
        states = stream.step(torch.tensor([ids[position] for ids in captions]), position)
        torch.testing.assert_close(states[0], whole[position], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(states[1], whole[7 + position], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_greedy_takes_the_best_token_of_the_whole_run():
    objective, pictures = tiny_flm(seed=3), images(3)
    banned = [VOCABULARY.bos_id, VOCABULARY.pad_id, VOCABULARY.mask_id]
    for number, found in enumerate(greedy(objective, pictures, max_tokens=6)):
        words: list[int] = []
        while len(words) < 6:
            logits = whole_run_logits(objective, pictures[number : number + 1], words)
            logits[banned] = float("-inf")
            token = int(logits.argmax())
            if token == VOCABULARY.eos_id:
                break
            words.append(token)
        assert found == words


@torch.no_grad()
def test_beam_finds_the_best_caption_of_all():
    """With as many beams as there are prefixes, beam search is exhaustive: compare with every caption of 0..2 words."""
    objective, picture = tiny_flm(seed=1, spread=0.4), images(1)
    allowed = [word for word in range(VOCABULARY.size) if word not in (0, 1, VOCABULARY.mask_id, VOCABULARY.eos_id)]

    def log_probabilities(words: list[int]) -> torch.Tensor:
        logits = whole_run_logits(objective, picture, words)
        logits[[0, 1, VOCABULARY.mask_id]] = float("-inf")
        return logits.log_softmax(-1)

    start = log_probabilities([])
    after = {first: log_probabilities([first]) for first in allowed}
    candidates = {(): start[2].item() / 1}
    candidates |= {(first,): (start[first] + after[first][2]).item() / 2 for first in allowed}
    candidates |= {
        (first, second): (start[first] + after[first][second]).item() / 2
        for first, second in itertools.product(allowed, allowed)
    }
    expected = max(candidates, key=candidates.get)
    assert tuple(beam(objective, picture, max_tokens=2, beams=len(allowed))[0]) == expected


@torch.no_grad()
def test_one_beam_without_length_penalty_follows_greedy_prefixes():
    objective, pictures = tiny_flm(seed=3), images(2)
    for one, other in zip(beam(objective, pictures, 5, beams=1), greedy(objective, pictures, 5), strict=True):
        assert one == other[: len(one)]


def test_released_behaviour_needs_a_prompt():
    objective = tiny_flm("released")
    with pytest.raises(ValueError, match="prompt"):
        greedy(objective, images(1))
    assert greedy(objective, images(1), max_tokens=4, prompt=[7])[0][0] == 7


def test_too_long_a_caption_is_refused():
    with pytest.raises(ValueError, match="max_tokens is 38"):
        greedy(tiny_flm(), images(1), max_tokens=38)
