"""The decoder of captioning, FLM, AR and PrefixLM: the l2r stream fed one token at a time, its keys and values kept.

The image is encoded once, its keys and values are computed once a layer; each step costs one token.
Legend: B images, K sequences of an image, G = B*K sequences, H heads, P image tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import merge_heads, split_heads
from model.decode.language import LanguageDecoder
from model.decode.search import Decoder
from model.evlgen import EVLGen
from model.plans.captions import CaptionForm
from model.towers import encode_images


def decoder_of(
    objective: nn.Module,
    images: Tensor,
    prompt: Sequence[int] = (),
    tokens: Tensor | None = None,
    questions: Sequence[Sequence[int]] | None = None,
) -> Decoder:
    """A decoder of captions for the searches of :mod:`model.decode.search`.

    Args:
        objective: in eval mode, one that predicts from left to right: ``Captioning``, a ``Pretraining`` of flm, ar or
            prefixlm, or EVLGen's.
        images: uint8 [B, 1, 3, S, S] on the model's device.
        prompt: word ids every caption starts with; needed for pretraining in released behaviour, which never learns the
            first word.
        tokens: [B, P, D] of the images, where they are encoded already (the network's ``encode``).
        questions: word ids that are read behind each image before its text; EVLGen's only.

    Raises:
        ValueError: an mlm model, or released behaviour without a prompt.
    """
    if isinstance(objective.net, EVLGen):
        tokens = objective.net.encode(images) if tokens is None else tokens
        return LanguageDecoder(objective.net, tokens, prompt, questions)
    assert questions is None
    if objective.name == "mlm":
        raise ValueError(
            "an mlm model does not predict from left to right; caption with model.decode.mask_predict.mask_predict"
        )
    net = objective.net
    form = getattr(objective, "form", CaptionForm(net.vocabulary))
    if net.released and not form.begin and not prompt:
        raise ValueError("released behaviour never learns the first word of a caption; give a prompt, such as 'a'")
    tokens = encode_images(net, images) if tokens is None else tokens
    return StreamDecoder(net, objective.lm_head, form, tokens, prompt)


class StreamDecoder:
    """A :class:`model.decode.search.Decoder` over the l2r stream of a network (FLM or OneStream).

    Weights are reached by calling modules, so that ZeRO-3 gathers them. Tokens that no caption holds are never found.

    # NOTE release: its captioning rules out no token; with the release's form of captions neither does this.
    """

    def __init__(
        self, net: nn.Module, lm_head: nn.Module, form: CaptionForm, tokens: Tensor, prompt: Sequence[int] = ()
    ) -> None:
        """``tokens``: projected tokens [B, P, D] of the images."""
        self.net, self.lm_head = net, lm_head
        vocabulary = net.vocabulary
        self.end_ids, self.prompt = form.end_ids, list(prompt)
        first = [] if net.released else [vocabulary.bos_id]  # the release's `<s>` is seen by no word
        self._start = [*first, *form.begin, *prompt]
        self._position = int(net.released)  # of the next token; `<s>` stands at 0
        # `<s>` stands at row 2 of the table, then the form's begin, then the caption's words
        self.limit = net.embedding.position.num_embeddings - 3 - len(form.begin)
        never = [] if form.begin else [vocabulary.bos_id, vocabulary.pad_id, vocabulary.mask_id]
        self._never = torch.tensor(never, device=tokens.device, dtype=torch.int64)
        self._images = [
            [part.contiguous() for part in split_heads(attention.key_value(tokens), attention.num_heads, 2)]
            for attention in (layer.cross_attention for layer in net.top)
        ]
        self._cache: list[tuple[Tensor, Tensor] | None] = [None] * (len(net.bottom) + len(net.top))

    def start(self) -> Tensor:
        """Feeds what begins a caption and the prompt; returns the scores fp32 [B, V]."""
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
