"""The cached stream against the network run as a whole, and captions against searches that keep nothing."""

from __future__ import annotations

import pytest
import torch

from model.batch import Row
from model.decode.search import beam, greedy
from model.decode.stream import decoder_of
from tests.model.decode.test_search import beam_by_definition, greedy_by_definition
from tests.rounding import DOUBLE, TINY
from tests.tiny_flm import VOCABULARY, caption, captioner, images, tiny_flm

EOS = VOCABULARY.eos_id
NEVER = [VOCABULARY.bos_id, VOCABULARY.pad_id, VOCABULARY.mask_id]


def whole_run_scores(objective, picture: torch.Tensor, words: list[int]) -> list[float]:
    """Scores of the token after ``words``, from one uncached pass over the sentence."""
    batch = objective.planner(picture, [Row([0, *words, 5, 2], 0, 0)])  # the state after `words` does not see the 5
    [place] = (batch.plan.l2r_index == len(words)).nonzero().flatten().tolist()
    logits = objective.lm_head.logits(objective.net(batch).l2r[place : place + 1])[0]
    logits[NEVER] = float("-inf")
    return logits.tolist()


@torch.no_grad()
def test_cached_states_equal_the_whole_run():
    objective, pictures = tiny_flm().double(), images(2)
    captions = [caption(6, seed) for seed in (1, 2)]
    batch = objective.planner(pictures, [Row(ids, number, 0) for number, ids in enumerate(captions)])
    whole = objective.net(batch).l2r
    decoder = decoder_of(objective, pictures)
    for position in range(7):
        states = decoder.states(torch.tensor([ids[position] for ids in captions]))
        torch.testing.assert_close(states[0], whole[position], rtol=DOUBLE, atol=DOUBLE)
        torch.testing.assert_close(states[1], whole[7 + position], rtol=DOUBLE, atol=DOUBLE)


@torch.no_grad()
def test_selected_sequences_go_on_from_their_own_words():
    """Two images, one sequence each; then three each, of which some are taken twice and some dropped; then two each."""
    objective, pictures = tiny_flm(), images(2)
    decoder = decoder_of(objective, pictures)
    decoder.start()
    steps = [
        ([0, 0, 0, 1, 1, 1], [4, 5, 6, 7, 8, 9]),
        ([2, 0, 2, 4, 4, 3], [10, 11, 10, 13, 14, 15]),
        ([1, 2, 5, 4], [16, 17, 18, 19]),
    ]
    words: list[list[int]] = [[], []]
    for chosen, ids in steps:
        decoder.select(torch.tensor(chosen))
        scores = decoder.step(torch.tensor(ids))
        words = [[*words[number], token] for number, token in zip(chosen, ids, strict=True)]
        for row, (own, found) in enumerate(zip(words, scores, strict=True)):
            image = row // (len(words) // 2)
            expected = whole_run_scores(objective, pictures[image : image + 1], own)
            torch.testing.assert_close(found, torch.tensor(expected), rtol=TINY, atol=16 * TINY)  # logits up to 16


@pytest.mark.slow
@pytest.mark.parametrize(
    ("behaviour", "name", "spread", "prompt"),
    [
        ("default", "flm", 1.2, []),
        ("default", "ar", 1.2, [7]),
        ("default", "prefixlm", 1.6, []),
        ("released", "flm", 1.2, [7, 9]),
    ],
)
@torch.no_grad()
def test_captions_are_those_of_searches_without_a_cache(
    behaviour: str, name: str, spread: float, prompt: list[int]
) -> None:
    objective, pictures = captioner(behaviour, name, spread), images(4, seed=1)
    found = []
    for number in range(4):
        scores = lambda words, number=number: whole_run_scores(objective, pictures[number : number + 1], words)  # noqa: E731
        found.append((greedy_by_definition(scores, 6, prompt, EOS), beam_by_definition(scores, 6, 3, 1.0, prompt, EOS)))
    by_greedy, by_beam = (list(captions) for captions in zip(*found, strict=True))
    assert greedy(decoder_of(objective, pictures, prompt), 6) == by_greedy
    assert beam(decoder_of(objective, pictures, prompt), 6, 3) == by_beam
    assert by_greedy != by_beam
    assert len({len(words) for words in by_greedy}) > 1  # else nothing would be tested
    assert not set(NEVER) & {word for words in by_greedy + by_beam for word in words}


def test_what_cannot_be_decoded_is_refused():
    with pytest.raises(ValueError, match="prompt"):
        decoder_of(tiny_flm("released"), images(1))
    with pytest.raises(ValueError, match="mask_predict"):
        decoder_of(tiny_flm(name="mlm"), images(1))
    with pytest.raises(ValueError, match="max_tokens is 38"):
        greedy(decoder_of(tiny_flm(), images(1)), max_tokens=38)
    assert greedy(decoder_of(tiny_flm(), images(1)), max_tokens=37)
