"""Captions of a captioning model: cached against re-running the network per token, in any batch; released decoding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.batch import Row
from model.build import build_captioning
from model.config import objective_options
from model.decode.likelihood import log_probabilities
from model.decode.search import beam, greedy, nucleus
from model.decode.stream import decoder_of
from model.towers import encode_images
from tests.rounding import TINY
from tests.tiny_flm import MAX_TEXT_LENGTH, VOCABULARY, images, tiny_config

MAX_TOKENS = 8


def trained(behaviour: str = "default", name: str = "flm") -> torch.nn.Module:
    """A captioning model whose captions hang on the image and have different lengths."""
    torch.manual_seed(3)
    built = build_captioning(tiny_config(behaviour), objective_options(name), VOCABULARY, MAX_TEXT_LENGTH)
    with torch.no_grad():
        for parameter_name, parameter in built.named_parameters():
            if parameter.ndim > 1 and "vision" not in parameter_name:
                parameter.mul_(1.6)
        built.lm_head.weight[list(built.form.end_ids)] *= 4
    return built.eval()


class Recorded:
    """A decoder that keeps the scores it gave."""

    def __init__(self, decoder) -> None:
        self.decoder, self.scores = decoder, []
        self.end_ids, self.prompt, self.limit, self.select = (
            decoder.end_ids,
            decoder.prompt,
            decoder.limit,
            decoder.select,
        )

    def start(self) -> Tensor:
        self.scores.append(self.decoder.start())
        return self.scores[-1]

    def step(self, ids: Tensor) -> Tensor:
        self.scores.append(self.decoder.step(ids))
        return self.scores[-1]


def rerun(objective, picture: Tensor, words: list[int]) -> Tensor:
    """Logits [V] of the token after ``words``: the whole network over one caption, nothing kept."""
    form, vocabulary = objective.form, objective.net.vocabulary
    ids = [vocabulary.bos_id, *form.begin, *words, vocabulary.eos_id]
    batch = objective.planner()(picture, [Row(ids, 0, 0)])
    place = (batch.plan.l2r_index == len(ids) - 2).nonzero().flatten()
    return objective.lm_head.logits(objective.net(batch).l2r[place])[0]


SEARCHES: dict[str, Callable] = {
    "greedy": lambda decoder, uniforms: greedy(decoder, MAX_TOKENS),
    "beam": lambda decoder, uniforms: beam(decoder, MAX_TOKENS, 3),
    "nucleus": lambda decoder, uniforms: nucleus(decoder, MAX_TOKENS, uniforms, 0.9),
}
MODEL, ALONE = trained(), {}
UNIFORMS = torch.rand(7, MAX_TOKENS, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("search", SEARCHES)
@settings(max_examples=12)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=7, unique=True))
def test_a_caption_is_the_same_in_every_batch_and_order(search: str, chosen: list[int]) -> None:
    objective, pictures = MODEL, images(7, seed=1)
    if search not in ALONE:
        ALONE[search] = [
            SEARCHES[search](decoder_of(objective, pictures[i : i + 1]), UNIFORMS[i : i + 1])[0] for i in range(7)
        ]
        assert len({tuple(words) for words in ALONE[search]}) > 1  # else nothing would be tested
    found = SEARCHES[search](decoder_of(objective, pictures[chosen]), UNIFORMS[chosen])
    assert found == [ALONE[search][number] for number in chosen]


@pytest.mark.parametrize(("behaviour", "name"), [("default", "flm"), ("released", "flm"), ("released", "ar")])
@torch.no_grad()
def test_cached_logits_are_those_of_rerunning_the_network(behaviour: str, name: str) -> None:
    """Within 1e-5 in fp32 and with the same greedy caption, whatever the batch: start `<s>`, or `<s> <bos>` in the
    released form, where `<s>` is invisible; stop at any end token, or after MAX_TOKENS steps."""
    objective, pictures, lengths = trained(behaviour, name), images(5, seed=2), set()
    for batch in ([0, 1, 2, 3, 4], [3, 1], [4]):
        decoder = Recorded(decoder_of(objective, pictures[batch]))
        captions = greedy(decoder, MAX_TOKENS)
        for row, picture in enumerate(batch):
            words: list[int] = []
            while len(words) < MAX_TOKENS:
                logits = rerun(objective, pictures[picture : picture + 1], words)
                cached = decoder.scores[len(words)][row]
                allowed = cached.isfinite()
                torch.testing.assert_close(cached[allowed], logits[allowed], rtol=1e-5, atol=1e-5)
                logits[~allowed] = float("-inf")
                word = int(logits.argmax())
                if word in objective.form.end_ids:
                    break
                words.append(word)
            assert words == captions[row]
            lengths.add(len(words))
            assert allowed.all() == (behaviour == "released"), "the release rules out no token"
    assert len(lengths) > 1  # else nothing would be tested


@pytest.mark.parametrize(("behaviour", "name"), [("default", "flm"), ("released", "flm")])
@torch.no_grad()
def test_log_probabilities_are_those_of_the_words_and_the_end(behaviour: str, name: str) -> None:
    """By re-running the network per token; a caption of MAX_TOKENS words was cut, so its end is not among them."""
    objective, pictures = trained(behaviour, name), images(4, seed=3)
    captions = [[7, 9], [], [5, 6, 7, 8, 9, 10, 11, 12], [3]]
    end = objective.form.end_ids[-1]  # `<eos>` in the released form
    found = log_probabilities(objective, encode_images(objective.net, pictures), captions, MAX_TOKENS)
    for number, words in enumerate(captions):
        targets = words if len(words) == MAX_TOKENS else [*words, end]
        steps = [
            rerun(objective, pictures[number : number + 1], words[:k]).log_softmax(-1) for k in range(len(targets))
        ]
        expected = sum(float(step[target]) for step, target in zip(steps, targets, strict=True))
        assert float(found[number]) == pytest.approx(expected, abs=10 * len(targets) * TINY)


@torch.no_grad()
def test_the_prompt_is_not_scored() -> None:
    objective, pictures = trained(), images(1, seed=3)
    tokens = encode_images(objective.net, pictures)
    whole, after, head = (
        float(log_probabilities(objective, tokens, [words], limit, prompt)[0])
        for words, limit, prompt in (([7, 9, 4], 30, 0), ([7, 9, 4], 30, 2), ([7, 9], 2, 0))
    )
    assert whole == pytest.approx(after + head, abs=1e-4)
