"""The decoder of EVLGen: a language model fed one token at a time behind the image's, its keys and values kept.

Legend: B images, G sequences, Q image tokens, L width of the language model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.evlgen import EVLGen

ANY_LENGTH = 1 << 20


class LanguageDecoder:
    """A :class:`model.decode.search.Decoder` over the language model of an EVLGen network.

    Weights are reached by calling modules, so that ZeRO-3 gathers them.
    """

    def __init__(self, net: EVLGen, tokens: Tensor, prompt: Sequence[int] = (), fewest_words: int = 0) -> None:
        """
        Args:
            net: in eval mode.
            tokens: [B, Q, L], of the images (``EVLGen.encode``).
            prompt: word ids that every text starts with.
            fewest_words: no text ends before it has so many, the prompt's included.
        """
        self._language, self._tokens = net.language, net.prefix(tokens)
        self.end_ids, self.prompt = net.form.end[:1], list(prompt)
        self.repetition_penalty = net.form.repetition_penalty
        self._first = [*net.form.begin, *prompt]
        self._fewest, self._num_words, longest = fewest_words, len(prompt), net.language.max_length
        self.limit = ANY_LENGTH if longest is None else longest - self._tokens.shape[1] - len(net.form.begin) - 1
        self._kept = net.language.new_memory()

    def start(self) -> Tensor:
        """Reads the images, what begins a text, and the prompt; returns the scores fp32 [B, V]."""
        first = torch.tensor(self._first, device=self._tokens.device, dtype=torch.int64)
        words = self._language.embed(first).to(self._tokens.dtype).expand(len(self._tokens), -1, -1)
        return self._scores(torch.cat([self._tokens, words], dim=1))

    def step(self, ids: Tensor) -> Tensor:
        """Appends ``ids`` int64 [G]; returns the scores fp32 [G, V] of the next token."""
        self._num_words += 1
        return self._scores(self._language.embed(ids[:, None]).to(self._tokens.dtype))

    def select(self, sequences: Tensor) -> None:
        """Goes on with ``sequences`` int64 [G], image by image."""
        self._kept.reorder_cache(sequences)

    def _scores(self, inputs: Tensor) -> Tensor:
        states = self._language.states(inputs, self._kept)
        scores = self._language.logits(states[:, -1]).float()
        if self._num_words < self._fewest:
            scores[:, list(self.end_ids)] = float("-inf")
        return scores
