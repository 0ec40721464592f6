"""Greedy and beam search over a table of probabilities, against their definition in plain Python."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.decode.search import beam, greedy
from model.decode.stream import decoder_of
from tests.tiny_flm import VOCABULARY, images, tiny_flm

EOS = 2
NEVER = float("-inf")
Scores = Callable[[int, Sequence[int]], list[float]]  # of each next token, given image and words


class TableDecoder:
    """A decoder that looks up what comes next, remembering each sequence as a list."""

    def __init__(self, scores: Scores, num_images: int, prompt: Sequence[int] = (), limit: int = 50) -> None:
        self.eos_id, self.prompt, self.limit = EOS, prompt, limit
        self.scores, self.num_steps = scores, 0
        self.sequences = [(image, list(prompt)) for image in range(num_images)]

    def start(self) -> Tensor:
        return torch.tensor([self.scores(*one) for one in self.sequences])

    def step(self, ids: Tensor) -> Tensor:
        self.num_steps += 1
        self.sequences = [(image, [*words, int(token)]) for (image, words), token in zip(self.sequences, ids)]
        return torch.tensor([self.scores(*one) for one in self.sequences])

    def select(self, sequences: Tensor) -> None:
        self.sequences = [self.sequences[number] for number in sequences]


def random_scores(seed: int, size: int, eos_bonus: float, share_of_never: float) -> Scores:
    def scores(image: int, words: Sequence[int]) -> list[float]:
        draw = random.Random(repr((seed, image, tuple(words))))
        row = [NEVER if draw.random() < share_of_never else draw.gauss(0, 2) for _ in range(size)]
        row[EOS] = draw.gauss(eos_bonus, 2)
        return row

    return scores


def log_softmax(scores: Sequence[float]) -> list[float]:
    total = math.log(sum(math.exp(score) for score in scores))
    return [score - total for score in scores]


def beam_by_definition(
    scores: Callable[[Sequence[int]], list[float]],
    max_tokens: int,
    beams: int,
    penalty: float,
    prompt: Sequence[int] = (),
    eos: int = EOS,
) -> list[int]:
    """One image's caption; every step is taken, none is spared by stopping early."""
    best, found = -math.inf, list(prompt)
    alive: list[tuple[float, list[int]]] = [(0.0, list(prompt))]
    for length in range(len(prompt) + 1, max_tokens + 1):
        following = []
        for value, words in alive:
            for token, log_probability in enumerate(log_softmax(scores(words))):
                if token != eos:
                    following.append((value + log_probability, [*words, token]))
                elif (value + log_probability) / length**penalty > best:
                    best, found = (value + log_probability) / length**penalty, words
        alive = sorted(following, key=lambda one: -one[0])[:beams]
    for value, words in alive:
        if value / max_tokens**penalty > best:
            best, found = value / max_tokens**penalty, words
    return found


def greedy_by_definition(
    scores: Callable[[Sequence[int]], list[float]], max_tokens: int, prompt: Sequence[int] = (), eos: int = EOS
) -> list[int]:
    words = list(prompt)
    while len(words) < max_tokens:
        row = scores(words)
        if row.index(max(row)) == eos:
            break
        words.append(row.index(max(row)))
    return words


@pytest.mark.parametrize(("eos_bonus", "share_of_never"), [(-3.0, 0.0), (0.0, 0.0), (3.0, 0.0), (0.0, 0.6), (0.0, 1.0)])
@pytest.mark.parametrize("prompt", [(), (4, 1)])
def test_searches_find_what_their_definition_finds(
    prompt: tuple[int, ...], eos_bonus: float, share_of_never: float
) -> None:
    lengths, differences = set(), 0
    for seed in range(12):
        draw = random.Random(seed)
        max_tokens, beams, penalty = draw.randint(3, 7), draw.randint(1, 6), draw.choice([-0.5, 0.0, 0.5, 1.0, 2.0])
        table = random_scores(seed, 6, eos_bonus, share_of_never)
        by_beam = beam(TableDecoder(table, 4, prompt), max_tokens, beams, penalty)
        by_greedy = greedy(TableDecoder(table, 4, prompt), max_tokens)
        for image in range(4):
            scores = lambda words, image=image, table=table: table(image, words)  # noqa: E731
            assert by_beam[image] == beam_by_definition(scores, max_tokens, beams, penalty, prompt)
            assert by_greedy[image] == greedy_by_definition(scores, max_tokens, prompt)
        lengths |= {len(caption) for caption in by_beam}
        differences += by_beam != by_greedy
    assert share_of_never == 1 or (len(lengths) > 1 and differences)  # else nothing would be tested


def test_beam_finds_the_best_caption_of_all() -> None:
    """With as many beams as there are prefixes beam search is exhaustive: compare with every caption of 0..2 words."""
    for seed in range(20):
        scores = random_scores(seed, 6, 0.0, 0.0)
        words = [token for token in range(6) if token != EOS]
        start = log_softmax(scores(0, []))
        values = {(): start[EOS]}
        for one in words:
            after = log_softmax(scores(0, [one]))
            values[one,] = (start[one] + after[EOS]) / 2
            values |= {(one, token): (start[one] + after[token]) / 2 for token in words}
        assert tuple(beam(TableDecoder(scores, 1), 2, beams=5)[0]) == max(values, key=values.get)


def test_one_beam_is_greedy_where_no_caption_ends() -> None:
    scores = random_scores(0, 6, -1000.0, 0.0)
    found = beam(TableDecoder(scores, 5), 7, beams=1)
    assert found == greedy(TableDecoder(scores, 5), 7)
    assert [len(caption) for caption in found] == [7] * 5


def test_of_equal_captions_the_first_is_kept() -> None:
    """Without length penalty `</s>` at once, of probability 1/2, is worth as much as word 0 and then `</s>`."""
    decoder = lambda: TableDecoder(lambda _, words: [NEVER if words else 0.0, NEVER, 0.0], 1)  # noqa: E731
    assert beam(decoder(), 5, 2, length_penalty=0.0) == [[]]
    assert beam(decoder(), 5, 2, length_penalty=0.1) == [[0]]


def test_a_search_stops_when_nothing_better_can_come() -> None:
    probable_end = random_scores(0, 6, eos_bonus=30.0, share_of_never=0.0)
    for search in (greedy, beam):
        decoder, asked = TableDecoder(probable_end, 3), []
        found = search(decoder, 20)
        assert decoder.num_steps <= 1
        slow = TableDecoder(probable_end, 3)
        assert search(slow, 20, all_agree=lambda done, asked=asked: asked.append(done)) == found  # never agreed
        assert slow.num_steps == 19
        assert asked[-1] is True


def test_what_cannot_be_searched_is_refused() -> None:
    decoder = TableDecoder(random_scores(0, 6, 0.0, 0.0), 1, prompt=[3, 4], limit=9)
    for search in (greedy, beam):
        for max_tokens in (2, 10):
            with pytest.raises(ValueError, match=f"is {max_tokens}, expected more than the prompt's 2, at most 9"):
                search(decoder, max_tokens)
    for beams in (0, 7):
        with pytest.raises(ValueError, match=f"beams is {beams}, expected 1 to the number of tokens, 6"):
            beam(decoder, 5, beams)


class Transfers(TorchDispatchMode):
    """Counts what waits for a device: scalars read, and sizes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = str(function)
        self.count += name.startswith(("aten._local_scalar_dense", "aten.item", "aten.nonzero", "aten.masked_select"))
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("search", [greedy, beam])
def test_a_step_waits_for_the_device_once(search: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 images and 10 tokens: one question a step, and one transfer of all words."""
    objective = tiny_flm(seed=3)
    with torch.no_grad():
        objective.lm_head.bias[VOCABULARY.eos_id] = -100.0
    decoder, transfers = decoder_of(objective, images(8)), Transfers()
    for name in ("tolist", "cpu", "numpy"):  # those of a tensor on a CPU pass no dispatcher
        original = getattr(Tensor, name)

        def counted(self: Tensor, *arguments, original=original):
            transfers.count += 1
            return original(self, *arguments)

        monkeypatch.setattr(Tensor, name, counted)
    with transfers:
        found = search(decoder, 10)
    assert [len(caption) for caption in found] == [10] * 8
    assert 2 <= transfers.count <= 11
