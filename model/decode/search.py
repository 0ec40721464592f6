"""Search for probable sequences of tokens, greedy, by beam or by sampling, in whatever network a :class:`Decoder` is.

What a step finds stays on the device; the host asks once a step whether everything is done, and fetches the words at
the end. Legend: B images, K beams, G = B*K sequences, V vocabulary, N words that may follow the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Decoder(Protocol):
    """A network that says how probable each token is to come next in G sequences; it remembers what it was fed.

    Each of ``end_ids`` ends a sequence, ``prompt`` holds the words that every sequence starts with, ``limit`` is the
    largest number of words a sequence can have, prompt included.
    """

    end_ids: Sequence[int]
    prompt: Sequence[int]
    limit: int

    def start(self) -> Tensor:
        """Begins one sequence an image and feeds the prompt.

        Returns:
            Scores fp32 [B, V] of the next token: its log probability up to a constant of the row, -inf for never.
        """

    def step(self, ids: Tensor) -> Tensor:
        """Appends a token int64 [G] to each sequence; returns the scores [G, V] of the next."""

    def select(self, sequences: Tensor) -> None:
        """Goes on with the sequences numbered ``sequences`` int64 [G], image by image, each as often as it is named.

        G may change, and stays a multiple of B.
        """


def alone(done: bool) -> bool:
    """The agreement of a process that searches by itself: it is done when its own images are."""
    return done


@torch.no_grad()
def greedy(
    decoder: Decoder,
    max_tokens: int = 30,
    all_agree: Callable[[bool], bool] = alone,
    read: Tensor | None = None,
    min_tokens: int = 0,
    repetition_penalty: float = 1.0,
) -> list[list[int]]:
    """The most probable next token, again and again, until an end token or ``max_tokens``.

    Args:
        decoder: one that has not been started.
        max_tokens: longest sequence, prompt included.
        all_agree: whether all are done, given whether this process is. Ranks that share one network (ZeRO-3) must take
            equally many steps, so each goes on until the last is done; all need the same ``max_tokens`` and prompt.
        read: int64 [B, F], words that each image's own sequence goes on with after the prompt, -1 from where it has no
            more: questions of different lengths. None of them is an end token.
        min_tokens: no sequence ends before it has so many words, prompt and ``read`` included.
        repetition_penalty: as of :func:`penalised`, on the decoder's scores.

    Returns:
        Word ids of each image's sequence, prompt and ``read`` included, the end token left out. One of ``max_tokens``
        words was cut: the end token takes a place of its own.

    Raises:
        ValueError: ``max_tokens`` leaves no room after the prompt, or is more than the decoder can hold or less than
            ``min_tokens``.
    """
    num_read = 0 if read is None else read.shape[1]

    def choose(scores: Tensor, number: int) -> Tensor:
        best = scores.argmax(-1)
        return torch.where(read[:, number] >= 0, read[:, number], best) if number < num_read else best

    return _one_by_one(decoder, max_tokens, min_tokens, choose, all_agree, repetition_penalty)


@torch.no_grad()
def greedy_steps(
    decoder: Decoder, max_tokens: int = 30, min_tokens: int = 0, repetition_penalty: float = 1.0
) -> Iterator[list[list[int]]]:
    """What :func:`greedy` has found of each image's sequence after every step, the whole last; the host waits for each.

    Args, words and errors as of :func:`greedy`.
    """
    best = lambda scores, _: scores.argmax(-1)  # noqa: E731
    for words in _steps(decoder, max_tokens, min_tokens, best, alone, repetition_penalty):
        yield sequences(decoder, torch.stack(words, 1))


@torch.no_grad()
def nucleus(
    decoder: Decoder,
    max_tokens: int,
    uniforms: Tensor,
    top_p: float = 0.9,
    temperature: float = 1.0,
    all_agree: Callable[[bool], bool] = alone,
    min_tokens: int = 0,
) -> list[list[int]]:
    """Each next token drawn from the fewest most probable ones that have ``top_p`` of the probability together.

    Nucleus sampling (Holtzman, Buys, Du, Forbes, Choi 2020, arXiv 1904.09751, section 3.1); ``top_p`` 1 draws from all.
    A sequence depends on its own image and its own row of ``uniforms`` only.

    Args:
        decoder: one that has not been started.
        max_tokens: as of :func:`greedy`.
        uniforms: fp32 or fp64 [B, N] in [0, 1), one number for each word that may follow the prompt.
        top_p: above 0, at most 1; the most probable token is always among those drawn from.
        temperature: above 0; scores are divided by it.
        all_agree: as of :func:`greedy`.
        min_tokens: as of :func:`greedy`.

    Returns:
        As :func:`greedy`.

    Raises:
        ValueError: as :func:`greedy`, and for numbers out of their range or too few.
    """
    num_words = room(decoder, max_tokens, min_tokens)
    if not 0 < top_p <= 1 or not 0 < temperature < float("inf"):
        raise ValueError(f"top_p is {top_p} and temperature {temperature}, expected above 0 to 1, and above 0")
    if uniforms.shape[1] < num_words:
        raise ValueError(f"uniforms hold {uniforms.shape[1]} numbers an image, {num_words} words may follow the prompt")

    def draw(scores: Tensor, number: int) -> Tensor:
        ordered, ids = (scores.double() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
        upto = ordered.cumsum(-1)
        size = ((upto - ordered < top_p) & (ordered > 0)).sum(-1, keepdim=True)  # tokens in the nucleus
        point = uniforms[:, number : number + 1].to(upto) * upto.gather(-1, size - 1)
        place = torch.searchsorted(upto, point, right=True)
        return ids.gather(-1, torch.minimum(place, size - 1))[:, 0]

    return _one_by_one(decoder, max_tokens, min_tokens, draw, all_agree)


def _one_by_one(
    decoder: Decoder,
    max_tokens: int,
    min_tokens: int,
    choose: Callable[[Tensor, int], Tensor],
    all_agree: Callable[[bool], bool],
    repetition_penalty: float = 1.0,
) -> list[list[int]]:
    """One sequence an image, by ``_steps``."""
    words = []
    for words in _steps(decoder, max_tokens, min_tokens, choose, all_agree, repetition_penalty):  # noqa: B007
        pass
    return sequences(decoder, torch.stack(words, 1))


def _steps(
    decoder: Decoder,
    max_tokens: int,
    min_tokens: int,
    choose: Callable[[Tensor, int], Tensor],
    all_agree: Callable[[bool], bool],
    repetition_penalty: float,
) -> Iterator[list[Tensor]]:
    """The words int64 [B] so far, after every step; the same list each time.

    ``choose`` takes scores [B, V] and the number of the word, and gives the word [B].
    """
    num_words = room(decoder, max_tokens, min_tokens)
    held_back = min_tokens - len(decoder.prompt)  # so many words may not be an end
    words = [choose(_endless(decoder, decoder.start(), held_back > 0), 0)]
    finished = _ends(decoder, words[0])
    yield words
    while len(words) < num_words and not all_agree(bool(finished.all())):
        scores = penalised(decoder.step(words[-1]), torch.stack(words, 1), repetition_penalty)
        scores = _endless(decoder, scores, held_back > len(words))
        words.append(choose(scores, len(words)))
        finished = finished | _ends(decoder, words[-1])
        yield words


@torch.no_grad()
def beam(
    decoder: Decoder,
    max_tokens: int = 30,
    beams: int = 3,
    length_penalty: float = 1.0,
    all_agree: Callable[[bool], bool] = alone,
    min_tokens: int = 0,
    repetition_penalty: float = 1.0,
) -> list[list[int]]:
    """Beam search: the best of all sequences that ended, or were cut at ``max_tokens``.

    A sequence is worth its log probability / length**``length_penalty``, where the length counts the prompt and the
    end token; of equals the one found first. 0 is neutral, above 0 favours long ones. Every beam may end at every step,
    whatever its place among the beams, by the most probable of the end tokens; it keeps its place too. An image is done
    when none of its beams can become better than its best, even if all that it still adds were certain; so stopping
    early changes nothing.

    Args and returns as :func:`greedy`; ``repetition_penalty`` is on log probabilities.

    Raises:
        ValueError: as :func:`greedy`, and for less than one beam.
    """
    found = best_beams(decoder, 1, max_tokens, beams, length_penalty, all_agree, min_tokens, repetition_penalty)
    return [best.words for [best] in found]


class Found(NamedTuple):
    """A sequence: its word ids, prompt included and end token left out, and what it is worth by the search."""

    words: list[int]
    value: float


@torch.no_grad()
def best_beams(
    decoder: Decoder,
    count: int,
    max_tokens: int = 30,
    beams: int = 3,
    length_penalty: float = 1.0,
    all_agree: Callable[[bool], bool] = alone,
    min_tokens: int = 0,
    repetition_penalty: float = 1.0,
) -> list[list[Found]]:
    """The ``count`` best sequences of each image, the best first, by the search of :func:`beam`.

    An image is done when none of its beams can become better than the last of them. Where fewer are found the rest have
    the value -inf and no words.

    Args and errors as of :func:`beam`.
    """
    num_words = room(decoder, max_tokens, min_tokens)
    scores = decoder.start()
    (num_images, vocabulary), device = scores.shape, scores.device
    if beams < 1:
        raise ValueError(f"beams is {beams}, expected at least 1")
    ends = torch.tensor(decoder.end_ids, device=device)
    first = torch.arange(num_images, device=device)[:, None]
    sums = torch.zeros(
        num_images, 1, dtype=torch.float32, device=device
    )  # log probability of each beam, the largest first
    words = torch.full((num_images, 1, num_words), decoder.end_ids[0], device=device)
    best = _Best(count, words)
    for number in range(num_words):
        length = len(decoder.prompt) + number + 1
        of_word = scores.log_softmax(-1).view(num_images, -1, vocabulary)
        total = penalised(of_word, words[:, :, :number], repetition_penalty).add_(sums[:, :, None])
        if length > min_tokens:
            best.add(total[:, :, ends].amax(-1), length**length_penalty, words)
        total[:, :, ends] = float("-inf")
        sums, flat = total.flatten(1).topk(min(beams, total.shape[1] * vocabulary))
        parents, ids = flat // vocabulary, flat % vocabulary
        words = words[first, parents]
        words[:, :, number] = ids
        hope = sums[:, 0].double() / max((length + 1) ** length_penalty, max_tokens**length_penalty)
        if length == max_tokens or all_agree(bool((best.values[:, -1] >= hope).all())):
            break
        decoder.select((first * total.shape[1] + parents).flatten())
        scores = decoder.step(ids.flatten())
    best.add(sums, max_tokens**length_penalty, words)
    return best.found(decoder)


def penalised(scores: Tensor, words: Tensor, penalty: float) -> Tensor:
    """``scores`` [..., V], divided by ``penalty`` where above 0 and else multiplied, of the ``words`` int64 [..., N].

    Those are what a sequence has after its prompt (Keskar et al. 2019, "CTRL", section 4.1, as transformers does it: on
    logits in greedy search, on log probabilities in beams).
    """
    if penalty == 1:
        return scores
    found = scores.gather(-1, words)
    return scores.scatter(-1, words, torch.where(found > 0, found / penalty, found * penalty))


class _Best:
    """The ``count`` best sequences so far of each image: ``values`` fp64 [B, count], the largest first and of equals
    the one found first, and their words int64 [B, count, N]."""

    def __init__(self, count: int, words: Tensor) -> None:
        """``words``: [B, 1, N] that no word was chosen of."""
        shape = len(words), count
        self.values = torch.full(shape, float("-inf"), dtype=torch.float64, device=words.device)
        self._words = words.expand(-1, count, -1)

    def add(self, sums: Tensor, divisor: float, words: Tensor) -> None:
        """Sequences ``words`` [B, K, N] of log probability ``sums`` [B, K]."""
        values = torch.cat([self.values, sums.double() / divisor], dim=1)
        ordered, chosen = values.sort(dim=1, descending=True, stable=True)
        count = self.values.shape[1]
        rows = torch.arange(len(chosen), device=chosen.device)[:, None]
        self.values = ordered[:, :count]
        self._words = torch.cat([self._words, words], dim=1)[rows, chosen[:, :count]]

    def found(self, decoder: Decoder) -> list[list[Found]]:
        """Of each image, in their order."""
        texts, values = sequences(decoder, self._words.flatten(0, 1)), self.values.flatten().tolist()
        count, each = self.values.shape[1], [Found(*one) for one in zip(texts, values, strict=True)]
        return [each[start : start + count] for start in range(0, len(each), count)]


def room(decoder: Decoder, max_tokens: int, min_tokens: int = 0) -> int:
    """How many words may follow the prompt."""
    if min_tokens > max_tokens:
        raise ValueError(f"min_tokens is {min_tokens}, expected at most max_tokens, which is {max_tokens}")
    prompt = len(decoder.prompt)
    if not prompt < max_tokens <= decoder.limit:
        raise ValueError(
            f"max_tokens is {max_tokens}, expected more than the prompt's {prompt}, at most {decoder.limit}"
        )
    return max_tokens - prompt


def _endless(decoder: Decoder, scores: Tensor, holds: bool) -> Tensor:
    """The scores, where it ``holds`` without those of the end tokens."""
    if holds:
        scores[:, list(decoder.end_ids)] = float("-inf")
    return scores


def _ends(decoder: Decoder, ids: Tensor) -> Tensor:
    """bool [B]: which of ``ids`` int64 [B] end a sequence."""
    return torch.stack([ids == end for end in decoder.end_ids]).any(0)


def sequences(decoder: Decoder, words: Tensor) -> list[list[int]]:
    """The prompt and what stands before the first end token in each row of ``words`` int64 [B, N]."""
    return [[*decoder.prompt, *takewhile(lambda word: word not in decoder.end_ids, row)] for row in words.tolist()]
