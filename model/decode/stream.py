"""The decoder of FLM, AR and PrefixLM: the l2r stream fed one token at a time, its keys and values kept.

The image is encoded once, its keys and values are computed once a layer; each step costs one token.
Legend: B images, K sequences of an image, G = B*K sequences, H heads, P image tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import merge_heads, split_heads
from model.towers import encode_images


def decoder_of(objective: nn.Module, images: Tensor, prompt: Sequence[int] = ()) -> StreamDecoder:
    """A decoder of captions for the searches of :mod:`model.decode.search`.

    Args:
        objective: a ``Pretraining`` in eval mode whose l2r stream predicts (flm, ar, prefixlm).
        images: uint8 [B, 1, 3, S, S] on the model's device.
        prompt: word ids every caption starts with; needed for released behaviour, which never learns the first word.

    Raises:
        ValueError: an mlm model, or released behaviour without a prompt.
    """
    if objective.name == "mlm":
        raise ValueError(
            "an mlm model does not predict from left to right; caption with model.decode.mask_predict.mask_predict"
        )
    if objective.net.released and not prompt:
        raise ValueError("released behaviour never learns the first word of a caption; give a prompt, such as 'a'")
    return StreamDecoder(objective, images, prompt)


class StreamDecoder:
    """A :class:`model.decode.search.Decoder` over the l2r stream of a network (FLM or OneStream).

    Weights are reached by calling modules, so that ZeRO-3 gathers them.
    """

    def __init__(self, objective: nn.Module, images: Tensor, prompt: Sequence[int] = ()) -> None:
        self.net, self.lm_head = objective.net, objective.lm_head
        vocabulary = self.net.vocabulary
        self.eos_id, self.prompt = vocabulary.eos_id, list(prompt)
        self.limit = self.net.embedding.position.num_embeddings - 3  # `<s>` stands at row 2, the caption's words follow
        self._start = self.prompt if self.net.released else [vocabulary.bos_id, *self.prompt]
        self._position = int(self.net.released)  # of the next token; `<s>` stands at 0
        never = [vocabulary.bos_id, vocabulary.pad_id, vocabulary.mask_id]
        self._never = torch.tensor(never, device=images.device)
        tokens = encode_images(self.net, images)
        self._images = [
            [part.contiguous() for part in split_heads(attention.key_value(tokens), attention.num_heads, 2)]
            for attention in (layer.cross_attention for layer in self.net.top)
        ]
        self._cache: list[tuple[Tensor, Tensor] | None] = [None] * (len(self.net.bottom) + len(self.net.top))

    def start(self) -> Tensor:
        """Feeds ``<s>``, which released behaviour lacks, and the prompt; returns the scores fp32 [B, V]."""
        num_images = len(self._images[0][0])
        for word in self._start:
            states = self.states(torch.full((num_images,), word, device=self._never.device))
        return self._scores(states)

    def step(self, ids: Tensor) -> Tensor:
        """Appends ``ids`` int64 [G]; returns the scores fp32 [G, V] of the next token."""
        return self._scores(self.states(ids))

    def select(self, sequences: Tensor) -> None:
        """Goes on with ``sequences`` int64 [G], image by image."""
        self._cache = [(key[sequences], value[sequences]) for key, value in self._cache]

    def states(self, ids: Tensor) -> Tensor:
        """Appends ``ids`` int64 [G]; returns their states [G, D]."""
        net = self.net
        states = net.embedding(ids, torch.full_like(ids, self._position))
        self._position += 1
        for number, layer in enumerate(net.bottom):
            states = layer.ffn(layer.residual(self._attend(layer.attention, number, states), states))
        states = net.text_projection(states) + net.type_embedding.weight[0]
        for number, layer in enumerate(net.top, start=len(net.bottom)):
            states = layer.residual(self._attend(layer.attention, number, states), states)
            mixed = self._look(layer.cross_attention, *self._images[number - len(net.bottom)], states)
            states = layer.ffn(layer.cross_residual(mixed, states))
        return states

    def _attend(self, attention: nn.Module, number: int, states: Tensor) -> Tensor:
        query, key, value = split_heads(attention.qkv(states)[:, None], attention.num_heads, 3)
        if self._cache[number] is not None:
            key, value = torch.cat([self._cache[number][0], key], 2), torch.cat([self._cache[number][1], value], 2)
        self._cache[number] = (key, value)
        return attention.out(merge_heads(F.scaled_dot_product_attention(query, key, value))[:, 0])

    def _look(self, attention: nn.Module, key: Tensor, value: Tensor, states: Tensor) -> Tensor:
        """All sequences of an image read its keys and values [B, H, P, D/H] as if they were one text of K tokens."""
        (query,) = split_heads(attention.query(states).unflatten(0, (len(key), -1)), attention.num_heads)
        return attention.out(merge_heads(F.scaled_dot_product_attention(query, key, value)).flatten(0, 1))

    def _scores(self, states: Tensor) -> Tensor:
        """fp32 [G, V] of states [G, D]; tokens that no caption holds are excluded."""
        return self.lm_head.logits(states).float().index_fill_(1, self._never, float("-inf"))
