"""Caption generation from the l2r stream: greedy and beam search over cached keys and values.

The image is encoded once, its keys and values are computed once per layer; each step costs one token.
Legend: B images, K beams, G = B*K sequences, H heads, P image tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import merge_heads, split_heads


class CachedStream:
    """The l2r stream of a network (FLM or OneStream) fed one token at a time for G sequences."""

    def __init__(self, net: nn.Module, images: Tensor, beams: int = 1) -> None:
        """images uint8 [B, 1, 3, S, S]; each gets ``beams`` sequences."""
        self.net = net
        tokens = net.image_projection(net.vision(images[:, 0])) + net.type_embedding.weight[1]
        self.image_key_values = [
            tuple(part.repeat_interleave(beams, 0) for part in split_heads(attention.key_value(tokens), heads, 2))
            for attention, heads in ((layer.cross_attention, layer.cross_attention.num_heads) for layer in net.top)
        ]
        self.cache: list[tuple[Tensor, Tensor] | None] = [None] * (len(net.bottom) + len(net.top))

    def step(self, ids: Tensor, position: int) -> Tensor:
        """Appends the tokens ``ids`` int64 [G], all at ``position``; returns their states [G, D]."""
        net = self.net
        states = net.embedding(ids, torch.full_like(ids, position))
        for number, layer in enumerate(net.bottom):
            states = layer.ffn(layer.residual(self._attend(layer.attention, number, states), states))
        states = net.text_projection(states) + net.type_embedding.weight[0]
        for number, layer in enumerate(net.top, start=len(net.bottom)):
            states = layer.residual(self._attend(layer.attention, number, states), states)
            key, value = self.image_key_values[number - len(net.bottom)]
            (query,) = split_heads(layer.cross_attention.query(states)[:, None], layer.cross_attention.num_heads)
            mixed = merge_heads(F.scaled_dot_product_attention(query, key, value))[:, 0]
            states = layer.ffn(layer.cross_residual(layer.cross_attention.out(mixed), states))
        return states

    def select(self, sequences: Tensor) -> None:
        """Keeps the sequences int64 [G] (of the same images), for beam search."""
        self.cache = [(key[sequences], value[sequences]) for key, value in self.cache]

    def _attend(self, attention: nn.Module, number: int, states: Tensor) -> Tensor:
        query, key, value = split_heads(attention.qkv(states)[:, None], attention.num_heads, 3)
        if self.cache[number] is not None:
            key, value = torch.cat([self.cache[number][0], key], 2), torch.cat([self.cache[number][1], value], 2)
        self.cache[number] = (key, value)
        return attention.out(merge_heads(F.scaled_dot_product_attention(query, key, value))[:, 0])


@torch.no_grad()
def greedy(objective: nn.Module, images: Tensor, max_tokens: int = 30, prompt: Sequence[int] = ()) -> list[list[int]]:
    """The most likely next token, again and again, until ``</s>`` or ``max_tokens``.

    Args:
        objective: a ``Pretraining`` in eval mode whose l2r stream predicts (flm, ar, prefixlm).
        images: uint8 [B, 1, 3, S, S] on the model's device.
        max_tokens: longest caption, prompt included.
        prompt: word ids every caption starts with; needed for released behaviour, which never learns the first word.

    Returns:
        Word ids of each caption, special tokens left out.
    """
    stream, states, position = _start(objective, images, 1, prompt, max_tokens)
    eos_id = objective.net.vocabulary.eos_id
    captions = [list(prompt) for _ in range(len(images))]
    finished = torch.zeros(len(images), dtype=torch.bool)
    while True:
        ids = _next_scores(objective, states).argmax(-1)
        finished |= (ids == eos_id).cpu()
        for caption, token, done in zip(captions, ids.tolist(), finished.tolist(), strict=True):
            if not done:
                caption.append(token)
        if finished.all() or position >= max_tokens:  # the caption's words stand at positions 1 .. max_tokens
            return captions
        states = stream.step(ids, position)
        position += 1


@torch.no_grad()
def beam(
    objective: nn.Module,
    images: Tensor,
    max_tokens: int = 30,
    beams: int = 3,
    prompt: Sequence[int] = (),
    length_penalty: float = 1.0,
) -> list[list[int]]:
    """Beam search; the score of a finished caption is its log probability / length**length_penalty.

    Args and returns as :func:`greedy`.
    """
    if beams < 1:
        raise ValueError(f"beams is {beams}, expected at least 1")
    stream, states, position = _start(objective, images, beams, prompt, max_tokens)
    num_images, device, eos_id = len(images), images.device, objective.net.vocabulary.eos_id
    scores = torch.full((num_images, beams), float("-inf"), device=device)
    scores[:, 0] = 0.0  # all beams start equal: only the first counts
    captions = [[list(prompt) for _ in range(beams)] for _ in range(num_images)]
    best: list[tuple[float, list[int]]] = [(float("-inf"), list(prompt)) for _ in range(num_images)]
    for length in range(len(prompt) + 1, max_tokens + 1):
        step_scores = _next_scores(objective, states).log_softmax(-1).view(num_images, beams, -1)
        total = scores[:, :, None] + step_scores
        _finish(best, captions, total[:, :, eos_id].tolist(), length, length_penalty)
        total[:, :, eos_id] = float("-inf")
        scores, flat = total.flatten(1).topk(beams)
        parents, ids = flat // step_scores.shape[-1], flat % step_scores.shape[-1]
        captions = [
            [
                captions[image][parent] + [token]
                for parent, token in zip(parents[image].tolist(), ids[image].tolist(), strict=True)
            ]
            for image in range(num_images)
        ]
        if length == max_tokens or all(
            best[image][0] >= scores[image, 0].item() / max_tokens**length_penalty for image in range(num_images)
        ):
            break
        stream.select((parents + torch.arange(num_images, device=device)[:, None] * beams).flatten())
        states = stream.step(ids.flatten(), position)
        position += 1
    _finish(best, captions, scores.tolist(), max_tokens, length_penalty)
    return [caption for _, caption in best]


def _finish(best: list, captions: list, log_probabilities: list, length: int, penalty: float) -> None:
    """Replaces each image's best finished caption where one of its beams, ended here, scores higher."""
    for image, (candidates, values) in enumerate(zip(captions, log_probabilities, strict=True)):
        for caption, value in zip(candidates, values, strict=True):
            score = value / length**penalty
            if score > best[image][0]:
                best[image] = (score, caption)


def _start(
    objective: nn.Module, images: Tensor, beams: int, prompt: Sequence[int], max_tokens: int
) -> tuple[CachedStream, Tensor, int]:
    """Feeds the start token and the prompt; returns the stream, the last states and the next position."""
    net = objective.net
    if objective.name == "mlm":
        raise ValueError(
            "an mlm model does not predict from left to right; caption with model.decode_masked.mask_predict"
        )
    limit = net.embedding.position.num_embeddings - 3  # <s> stands at row 2, the caption's words follow
    if not len(prompt) < max_tokens <= limit:
        raise ValueError(f"max_tokens is {max_tokens}, expected more than the prompt's {len(prompt)}, at most {limit}")
    if net.released and not prompt:
        raise ValueError("released behaviour never learns the first word of a caption; give a prompt, such as 'a'")
    stream = CachedStream(net, images, beams)
    words = list(prompt) if net.released else [net.vocabulary.bos_id, *prompt]
    first = int(net.released)
    for position, word in enumerate(words, start=first):
        ids = torch.full((len(images) * beams,), word, dtype=torch.int64, device=images.device)
        states = stream.step(ids, position)
    return stream, states, first + len(words)


def _next_scores(objective: nn.Module, states: Tensor) -> Tensor:
    """fp32 [G, V] logits of the next token; tokens that no caption holds are excluded."""
    vocabulary = objective.net.vocabulary
    logits = objective.lm_head.logits(states).float()
    logits[:, [vocabulary.bos_id, vocabulary.pad_id, vocabulary.mask_id]] = float("-inf")
    return logits
