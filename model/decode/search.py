"""Search for probable sequences of tokens, greedy or by beam, in whatever network a :class:`Decoder` stands for.

What a step finds stays on the device; the host asks once a step whether everything is done, and fetches the words at
the end. Legend: B images, K beams, G = B*K sequences, V vocabulary, N words that may follow the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Protocol

import torch
from torch import Tensor


class Decoder(Protocol):
    """A network that says how probable each token is to come next in G sequences; it remembers what it was fed.

    ``eos_id`` ends a sequence, ``prompt`` holds the words that every sequence starts with, and ``limit`` is the largest
    number of words a sequence can have, prompt included.
    """

    eos_id: int
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
def greedy(decoder: Decoder, max_tokens: int = 30, all_agree: Callable[[bool], bool] = alone) -> list[list[int]]:
    """The most probable next token, again and again, until ``</s>`` or ``max_tokens``.

    Args:
        decoder: one that has not been started.
        max_tokens: longest sequence, prompt included.
        all_agree: whether all are done, given whether this process is. Ranks that share one network (ZeRO-3) must take
            equally many steps, so each goes on until the last is done; all need the same ``max_tokens`` and prompt.

    Returns:
        Word ids of each image's sequence, prompt included, ``</s>`` left out.

    Raises:
        ValueError: ``max_tokens`` leaves no room after the prompt, or is more than the decoder can hold.
    """
    num_words = _room(decoder, max_tokens)
    words = [decoder.start().argmax(-1)]
    finished = words[0] == decoder.eos_id
    while len(words) < num_words and not all_agree(bool(finished.all())):
        words.append(decoder.step(words[-1]).argmax(-1))
        finished = finished | (words[-1] == decoder.eos_id)
    return _sequences(decoder, torch.stack(words, 1))


@torch.no_grad()
def beam(
    decoder: Decoder,
    max_tokens: int = 30,
    beams: int = 3,
    length_penalty: float = 1.0,
    all_agree: Callable[[bool], bool] = alone,
) -> list[list[int]]:
    """Beam search: the best of all sequences that ended, or were cut at ``max_tokens``.

    A sequence is worth its log probability / length**``length_penalty``, where the length counts the prompt and
    ``</s>``; of equals the one found first. An image is done when none of its beams can become better than its best.

    Args and returns as :func:`greedy`.

    Raises:
        ValueError: as :func:`greedy`, and for less than one beam or more than there are tokens.
    """
    num_words = _room(decoder, max_tokens)
    scores = decoder.start()
    (num_images, vocabulary), device = scores.shape, scores.device
    if not 1 <= beams <= vocabulary:
        raise ValueError(f"beams is {beams}, expected 1 to the number of tokens, {vocabulary}")
    first = torch.arange(num_images, device=device)[:, None]
    sums = torch.zeros(num_images, 1, device=device)  # log probability of each beam, the largest first
    words = torch.full((num_images, 1, num_words), decoder.eos_id, device=device)
    best = torch.full((num_images,), float("-inf"), dtype=torch.float64, device=device)
    best_words = words[:, 0]
    for number in range(num_words):
        length = len(decoder.prompt) + number + 1
        total = scores.log_softmax(-1).view(num_images, -1, vocabulary).add_(sums[:, :, None])
        best, best_words = _better(best, best_words, total[:, :, decoder.eos_id], length**length_penalty, words)
        total[:, :, decoder.eos_id] = float("-inf")
        sums, flat = total.flatten(1).topk(beams)
        parents, ids = flat // vocabulary, flat % vocabulary
        words = words[first, parents]
        words[:, :, number] = ids
        hope = sums[:, 0].double() / max((length + 1) ** length_penalty, max_tokens**length_penalty)
        if length == max_tokens or all_agree(bool((best >= hope).all())):
            break
        decoder.select((first * total.shape[1] + parents).flatten())
        scores = decoder.step(ids.flatten())
    _, best_words = _better(best, best_words, sums, max_tokens**length_penalty, words)
    return _sequences(decoder, best_words)


def _better(best: Tensor, best_words: Tensor, sums: Tensor, divisor: float, words: Tensor) -> tuple[Tensor, Tensor]:
    """``best`` fp64 [B] and its words [B, N], replaced where ``sums`` [B, K] / ``divisor`` holds a larger value."""
    value, beam = (sums.double() / divisor).max(1)  # the first of equals
    found = words[torch.arange(len(beam), device=beam.device), beam]
    better = value > best
    return torch.where(better, value, best), torch.where(better[:, None], found, best_words)


def _room(decoder: Decoder, max_tokens: int) -> int:
    """How many words may follow the prompt."""
    prompt = len(decoder.prompt)
    if not prompt < max_tokens <= decoder.limit:
        raise ValueError(
            f"max_tokens is {max_tokens}, expected more than the prompt's {prompt}, at most {decoder.limit}"
        )
    return max_tokens - prompt


def _sequences(decoder: Decoder, words: Tensor) -> list[list[int]]:
    """The prompt and what stands before the first ``</s>`` in each row of ``words`` int64 [B, N]."""
    return [[*decoder.prompt, *takewhile(lambda word: word != decoder.eos_id, row)] for row in words.tolist()]
