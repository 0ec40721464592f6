"""The decoder of EVLGen: a language model fed one token at a time behind the image's, its keys and values kept.

Legend: B images, G sequences, Q image tokens, L width of the language model, V vocabulary, C tokens fed so far.
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

    def __init__(
        self,
        net: EVLGen,
        tokens: Tensor,
        prompt: Sequence[int] = (),
        questions: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """
        Args:
            net: in eval mode.
            tokens: [B, Q, L], of the images (``EVLGen.encode``).
            prompt: word ids that every text starts with.
            questions: B lists of word ids, of any lengths, each read behind its image before the text, which they are
                no part of.
        """
        self._language, self._tokens = net.language, net.prefix(tokens)
        self.end_ids, self.prompt = net.form.end[:1], list(prompt)
        self._read = [[*net.form.begin, *question, *prompt] for question in questions or [()]]
        self._of_one_length = questions is None
        longest, columns = net.language.max_length, self._tokens.shape[1] + max(map(len, self._read))
        self.limit = ANY_LENGTH if longest is None else longest - columns + len(self.prompt) - 1
        self._kept = net.language.new_memory()

    def start(self) -> Tensor:
        """Reads the images, what begins a text, and the prompt; returns the scores fp32 [B, V]."""
        num_images, num_tokens, _ = self._tokens.shape
        read = max(map(len, self._read))
        gaps = [read - len(ids) for ids in self._read]  # before the shorter ones, so that all end together
        words = torch.tensor(
            [[*[0] * gap, *ids] for gap, ids in zip(gaps, self._read)], device=self._tokens.device, dtype=torch.int64
        )
        words = self._language.embed(words).to(self._tokens.dtype).expand(num_images, -1, -1)
        inputs = torch.cat([self._tokens, words], dim=1)
        if self._of_one_length:
            return self._scores(inputs)
        column_C = torch.arange(num_tokens + read, device=inputs.device)
        gap_B1 = torch.tensor(gaps, device=inputs.device)[:, None]
        self._seen_BC = (column_C < num_tokens) | (column_C >= num_tokens + gap_B1)
        self._place_B = len(column_C) - gap_B1[:, 0]  # of the next token
        places = torch.where(column_C < num_tokens, column_C, column_C - gap_B1).clamp(min=0)
        square = torch.ones(len(column_C), len(column_C), dtype=torch.bool, device=inputs.device)
        allowed = (self._seen_BC[:, None] | ~square.tril(-1)) & square.tril()  # what fills a gap sees itself
        return self._scores(inputs, allowed, places)

    def step(self, ids: Tensor) -> Tensor:
        """Appends ``ids`` int64 [G]; returns the scores fp32 [G, V] of the next token."""
        inputs = self._language.embed(ids[:, None]).to(self._tokens.dtype)
        if self._of_one_length:
            return self._scores(inputs)
        self._seen_BC = torch.cat([self._seen_BC, torch.ones_like(self._seen_BC[:, :1])], dim=1)
        places, self._place_B = self._place_B[:, None], self._place_B + 1
        return self._scores(inputs, self._seen_BC[:, None], places)

    def select(self, sequences: Tensor) -> None:
        """Goes on with ``sequences`` int64 [G], image by image."""
        self._kept.reorder_cache(sequences)
        if not self._of_one_length:
            self._seen_BC, self._place_B = self._seen_BC[sequences], self._place_B[sequences]

    def _scores(self, inputs: Tensor, allowed: Tensor | None = None, places: Tensor | None = None) -> Tensor:
        """``allowed``: bool [G, L, C], which of the columns each of the inputs [G, L, D] sees, None: all before it."""
        added = None
        if allowed is not None:
            added = torch.zeros(allowed.shape, dtype=inputs.dtype, device=inputs.device)
            added = added.masked_fill_(~allowed, torch.finfo(inputs.dtype).min)[:, None]
        states = self._language.states(inputs, self._kept, added, places)
        return self._language.logits(states[:, -1]).float()
