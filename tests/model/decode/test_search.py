"""Greedy and beam search over a table of probabilities, against their definition in plain Python."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.decode.search import beam, best_beams, greedy, greedy_steps, nucleus
from model.decode.stream import decoder_of
from tests.tiny_flm import VOCABULARY, images, tiny_flm

EOS = 2
NEVER = float("-inf")
Scores = Callable[[int, Sequence[int]], list[float]]  # of each next token, given image and words


class TableDecoder:
    """A decoder that looks up what comes next, remembering each sequence as a list."""

    def __init__(
        self,
        scores: Scores,
        num_images: int,
        prompt: Sequence[int] = (),
        limit: int = 50,
        end_ids: Sequence[int] = (EOS,),
    ) -> None:
        self.end_ids, self.prompt, self.limit = end_ids, prompt, limit
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


def beams_by_definition(
    scores: Callable[[Sequence[int]], list[float]],
    max_tokens: int,
    beams: int,
    penalty: float,
    prompt: Sequence[int] = (),
    eos: int = EOS,
) -> list[tuple[float, list[int]]]:
    """All that one image's search finds, the best first; every step is taken, none is spared by stopping early."""
    found: list[tuple[float, list[int]]] = []
    alive: list[tuple[float, list[int]]] = [(0.0, list(prompt))]
    for length in range(len(prompt) + 1, max_tokens + 1):
        following = []
        for value, words in alive:
            for token, log_probability in enumerate(log_softmax(scores(words))):
                if token != eos:
                    following.append((value + log_probability, [*words, token]))
                else:
                    found.append(((value + log_probability) / length**penalty, words))
        alive = sorted(following, key=lambda one: -one[0])[:beams]
    found += [(value / max_tokens**penalty, words) for value, words in alive]
    return sorted((one for one in found if one[0] > -math.inf), key=lambda one: -one[0])


def beam_by_definition(
    scores: Callable[[Sequence[int]], list[float]],
    max_tokens: int,
    beams: int,
    penalty: float,
    prompt: Sequence[int] = (),
    eos: int = EOS,
) -> list[int]:
    """One image's caption."""
    return [*beams_by_definition(scores, max_tokens, beams, penalty, prompt, eos), (0.0, list(prompt))][0][1]


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


@pytest.mark.parametrize(("eos_bonus", "share_of_never"), [(-3.0, 0.0), (0.0, 0.0), (3.0, 0.0), (0.0, 0.6), (0.0, 1.0)])
def test_the_best_beams_are_those_of_their_definition(eos_bonus: float, share_of_never: float) -> None:
    """Those that are found, best first, of images of one batch that are done at different steps."""
    for seed in range(12):
        draw = random.Random(seed)
        max_tokens, beams, penalty = draw.randint(2, 7), draw.randint(1, 6), draw.choice([0.0, 0.5, 1.0, 2.0])
        table, count = random_scores(seed, 6, eos_bonus, share_of_never), draw.randint(1, 8)
        found = best_beams(TableDecoder(table, 4), count, max_tokens, beams, penalty)
        for image in range(4):
            scores = lambda words, image=image, table=table: table(image, words)  # noqa: E731
            expected = beams_by_definition(scores, max_tokens, beams, penalty)[:count]
            there = [one for one in found[image] if one.value > NEVER]
            assert [one.words for one in there] == [words for _, words in expected]
            assert [one.value for one in there] == pytest.approx([value for value, _ in expected], abs=1e-5)
            assert found[image][len(there) :] == [([], NEVER)] * (count - len(there))


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 0.6, 1.0, 2.0, 5.0])
def test_beam_search_with_all_beams_is_exhaustive(penalty: float) -> None:
    """As many beams as there are prefixes of 3 words: the best of all captions of 0 to 4 words, by counting them all.

    Logarithms of probabilities, summed and divided here in another order: the best is compared by its value.
    """
    words, num_words = [token for token in range(4) if token != EOS], 4
    for seed in range(6):
        scores = random_scores(seed, 4, 0.0, 0.0)
        values: dict[tuple[int, ...], float] = {}
        for length in range(num_words + 1):
            for caption in itertools.product(words, repeat=length):
                steps = [log_softmax(scores(0, caption[:k]))[token] for k, token in enumerate(caption)]
                if length < num_words:
                    steps.append(log_softmax(scores(0, caption))[EOS])
                values[caption] = math.fsum(steps) / min(length + 1, num_words) ** penalty
        found = tuple(beam(TableDecoder(scores, 1), num_words, beams=len(words) ** 3, length_penalty=penalty)[0])
        assert values[found] == pytest.approx(max(values.values()), rel=1e-6)
        assert len(values) == sum(len(words) ** n for n in range(num_words + 1))


def test_a_hand_scored_model() -> None:
    """Two words, scored by hand: "1" ends surely, "0 0" is likelier by word but longer; the penalty decides.

    Lengths count the end: [] .1 over 1; [1] .4 x 1 over 2; [0] .5 x .1 over 2; [0, 0] .5 x .9 x .95 = .4275 over 3;
    [0, 0, 0] .5 x .9 x .05 = .0225, cut at 3 words, over 3.
    """
    table = {(): [0.5, 0.4, 0.1], (0,): [0.9, 0.0, 0.1], (1,): [0.0, 0.0, 1.0], (0, 0): [0.05, 0.0, 0.95]}
    logs = lambda _, words: [math.log(p) if p else NEVER for p in table.get(tuple(words), [0.0, 0.0, 1.0])]  # noqa: E731
    worth = {
        (): lambda penalty: math.log(0.1),
        (1,): lambda penalty: math.log(0.4) / 2**penalty,
        (0, 0): lambda penalty: math.log(0.4275) / 3**penalty,
    }
    for penalty in (-2.0, -1.0, 0.0, 1.0):
        expected = max(worth, key=lambda caption, penalty=penalty: worth[caption](penalty))
        assert tuple(beam(TableDecoder(logs, 1), 3, 2, penalty)[0]) == expected
    assert beam(TableDecoder(logs, 1), 3, 2, -2.0) == [[]]
    assert beam(TableDecoder(logs, 1), 3, 2, -1.0) == [[1]]
    assert beam(TableDecoder(logs, 1), 3, 2, 0.0) == [[0, 0]]
    assert greedy(TableDecoder(logs, 1), 3) == [[0, 0]]


def test_any_of_several_end_tokens_ends_a_caption() -> None:
    """Of two end tokens the more probable one counts; neither stands in a caption."""
    for seed in range(12):
        scores = random_scores(seed, 6, 0.0, 0.0)
        one_end = lambda image, words, scores=scores: merged(scores(image, words))  # noqa: E731
        several = lambda: TableDecoder(scores, 3, end_ids=(EOS, 5))  # noqa: E731, B023
        by_greedy = greedy(several(), 6)
        assert by_greedy == [greedy_by_definition(lambda words, i=i: one_end(i, words), 6) for i in range(3)]  # noqa: B023
        found = [beam(several(), 6, 4), by_greedy, nucleus(several(), 6, torch.rand(3, 6, dtype=torch.float64))]
        assert all(word not in (EOS, 5) for captions in found for caption in captions for word in caption)


@pytest.mark.parametrize("prompt", [(), (4,)])
def test_no_sequence_ends_before_its_least_number_of_words(prompt: tuple[int, ...]) -> None:
    """Against the same searches of scores whose end can't come earlier; a beam keeps the probabilities of its words."""
    for seed in range(6):
        scores = random_scores(seed, 6, 3.0, 0.0)

        def late(image: int, words: Sequence[int], scores=scores) -> list[float]:
            row = log_softmax(scores(image, words))
            return [NEVER if token == EOS and len(words) < 4 else value for token, value in enumerate(row)]

        table = lambda: TableDecoder(scores, 3, prompt)  # noqa: E731, B023
        draws = torch.rand(3, 6, dtype=torch.float64)
        assert greedy(table(), 6, min_tokens=4) == greedy(TableDecoder(late, 3, prompt), 6)
        assert nucleus(table(), 6, draws, min_tokens=4) == nucleus(TableDecoder(late, 3, prompt), 6, draws)
        found = beam(table(), 6, 4, 1.0, min_tokens=4)
        for image, words in enumerate(found):
            assert words == late_beam_by_definition(lambda one, i=image: scores(i, one), 6, 4, 4, prompt)  # noqa: B023
        assert all(4 <= len(words) <= 6 for words in found)


def late_beam_by_definition(
    scores: Callable[[Sequence[int]], list[float]], max_tokens: int, beams: int, least: int, prompt: Sequence[int]
) -> list[int]:
    best, found, alive = -math.inf, list(prompt), [(0.0, list(prompt))]
    for length in range(len(prompt) + 1, max_tokens + 1):
        following = []
        for value, words in alive:
            for token, log_probability in enumerate(log_softmax(scores(words))):
                if token != EOS:
                    following.append((value + log_probability, [*words, token]))
                elif len(words) >= least and (value + log_probability) / length > best:
                    best, found = (value + log_probability) / length, words
        alive = sorted(following, key=lambda one: -one[0])[:beams]
    return max([(best, found), *((value / max_tokens, words) for value, words in alive)], key=lambda one: one[0])[1]


def merged(row: list[float]) -> list[float]:
    """Scores in which the last token, an end, has given its place to the other end where it is the more probable."""
    return [*row[:EOS], max(row[EOS], row[5]), *row[EOS + 1 : 5], NEVER]


def nucleus_by_definition(
    scores: Callable[[Sequence[int]], list[float]],
    uniforms: Sequence[float],
    max_tokens: int,
    top_p: float,
    temperature: float,
) -> list[int]:
    words: list[int] = []
    for uniform in uniforms[:max_tokens]:
        row = [math.exp(value) for value in log_softmax([score / temperature for score in scores(words)])]
        order = sorted(range(len(row)), key=lambda token: -row[token])
        inside, mass = [], 0.0
        while mass < top_p and len(inside) < len(order) and row[order[len(inside)]] > 0:
            inside.append(order[len(inside)])
            mass += row[inside[-1]]
        below, chosen = 0.0, inside[-1]
        for token in inside:
            below += row[token]
            if uniform * mass < below:
                chosen = token
                break
        if chosen == EOS:
            break
        words.append(chosen)
    return words


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_nucleus_draws_what_its_definition_draws(top_p: float, temperature: float) -> None:
    for seed in range(8):
        scores = random_scores(seed, 7, 0.0, 0.2)
        uniforms = torch.rand(4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found = nucleus(TableDecoder(scores, 4), 6, uniforms, top_p, temperature)
        for image in range(4):
            own = lambda words, image=image, scores=scores: scores(image, words)  # noqa: E731
            assert found[image] == nucleus_by_definition(own, uniforms[image].tolist(), 6, top_p, temperature)
        if top_p < 0.01:
            assert found == greedy(TableDecoder(scores, 4), 6)


def test_nucleus_draws_each_word_as_often_as_it_is_probable() -> None:
    """A grid of uniforms stands for all draws: shares equal renormalised probabilities to the grid's spacing."""
    row = [math.log(p) for p in (0.4, 0.3, 0.05, 0.15, 0.1)]
    count = 1000
    uniforms = (torch.arange(count, dtype=torch.float64)[:, None] + 0.5) / count
    drawn = nucleus(TableDecoder(lambda image, words: row, count), 1, uniforms, top_p=0.8)
    shares = [sum(words == [token] for words in drawn) / count for token in range(5)]
    assert shares == pytest.approx([0.4 / 0.85, 0.3 / 0.85, 0, 0.15 / 0.85, 0], abs=1 / count)


def test_a_draw_hangs_on_its_own_uniforms_only() -> None:
    scores = random_scores(1, 6, -1.0, 0.0)
    uniforms = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
    whole = nucleus(TableDecoder(scores, 5), 8, uniforms)
    for image in range(5):
        single = lambda _, words, image=image: scores(image, words)  # noqa: E731
        assert nucleus(TableDecoder(single, 1), 8, uniforms[image : image + 1]) == [whole[image]]


def test_what_cannot_be_drawn_from_is_refused() -> None:
    decoder, uniforms = TableDecoder(random_scores(0, 6, 0.0, 0.0), 1), torch.zeros(1, 4)
    for top_p, temperature in ((0.0, 1.0), (1.1, 1.0), (0.9, 0.0), (0.9, math.inf), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="top_p is .* and temperature"):
            nucleus(decoder, 4, uniforms, top_p, temperature)
    with pytest.raises(ValueError, match="hold 4 numbers an image, 5 words may follow"):
        nucleus(decoder, 5, uniforms)


def test_one_beam_is_greedy_where_no_caption_ends() -> None:
    scores = random_scores(0, 6, -1000.0, 0.0)
    found = beam(TableDecoder(scores, 5), 7, beams=1)
    assert found == greedy(TableDecoder(scores, 5), 7)
    assert [len(caption) for caption in found] == [7] * 5


@pytest.mark.parametrize("prompt", [(), (3,)])
def test_steps_of_a_greedy_search_grow_into_what_it_finds(prompt: tuple[int, ...]) -> None:
    for seed in range(20):
        scores = random_scores(seed, 7, 1.0, 0.0)
        expected = greedy(TableDecoder(scores, 3, prompt), 8, min_tokens=2, repetition_penalty=1.3)
        steps = list(greedy_steps(TableDecoder(scores, 3, prompt), 8, 2, 1.3))
        assert steps[-1] == expected and torch.is_grad_enabled()
        for number, step in enumerate(steps):
            assert step == [words[: len(prompt) + number + 1] for words in expected]


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
    for beams in (0, -1):
        with pytest.raises(ValueError, match=f"beams is {beams}, expected at least 1"):
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
