"""Where the words of texts attended in their images, recorded while a network runs.

Legend: S packed states, R text rows, T padded text length, P image tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.attention import Attention
from model.batch import Batch, TextPlan
from model.vision.tower import Grid


@torch.no_grad()
def word_attention(net: nn.Module, batch: Batch, last: int | None = None) -> Tensor:
    """The share of each image token in what the states of each word took from the image, fp32 [R, T, P].

    Mean over heads, over the ``last`` top layers (None: all) and over the streams that have a state of the word; 0
    where no state was computed. ``net`` is a network of this package in evaluation mode, and is run once.

    Raises:
        ValueError: the network has no layer that reads images, or is in training mode, where weights are dropped out.
    """
    top = getattr(net, "top", None)
    if not top or net.training:
        raise ValueError("expected a network with top layers, in evaluation mode")
    recorded: list[_Recording] = []

    def record(_: nn.Module, inputs: tuple[Tensor, Tensor, Attention]) -> tuple[Tensor, Tensor, Attention]:
        recorded.append(_Recording(inputs[2]))
        return *inputs[:2], recorded[-1]

    layers = list(top)[-(last or len(top)) :]
    hooks = [layer.cross_attention.register_forward_pre_hook(record) for layer in layers]
    try:
        net(batch)
    finally:
        for hook in hooks:
            hook.remove()
    probabilities = torch.stack([one.probabilities for one in recorded]).mean(0)
    return _by_word(probabilities, recorded[0].cells, batch.plan)


class _Recording:
    """An ``Attention`` that keeps its probabilities [S, P]."""

    def __init__(self, attend: Attention) -> None:
        self._attend = attend
        self.cells = attend.queries.cells()

    def __call__(self, query: Tensor, key_value: Tensor, num_heads: int, rate: float) -> Tensor:
        self.probabilities = self._attend.probabilities(query, key_value, num_heads)
        return self._attend(query, key_value, num_heads, rate)


def _by_word(probabilities: Tensor, cells: tuple[Tensor, Tensor], plan: TextPlan) -> Tensor:
    """Mean over the states of each word; streams stand beside each other in the grid of the states."""
    (num_rows, num_positions), (row, position) = plan.text.shape, cells
    word = row * num_positions + position % num_positions
    total = probabilities.new_zeros(num_rows * num_positions, probabilities.shape[1]).index_add_(0, word, probabilities)
    count = torch.bincount(word, minlength=num_rows * num_positions).clamp(min=1)
    return (total / count[:, None]).unflatten(0, (num_rows, num_positions))


def text_attention_map(words: Tensor, lengths: Sequence[int]) -> Tensor:
    """Mean over the words of each text, `<s>` and `</s>` left out, fp32 [R, P], of ``words`` [R, T, P].

    A text without words, or without states of them, gets the mean over all states that it has; without any it gets 0.
    """
    found = []
    for row, length in zip(words, lengths, strict=True):
        states = row[row.sum(1) > 0]
        inner = row[1 : length - 1]
        inner = inner[inner.sum(1) > 0]
        counted = inner if len(inner) else states
        found.append(counted.sum(0) / max(len(counted), 1))
    return torch.stack(found)


def on_grid(attention: Tensor, grid: Grid) -> Tensor:
    """[..., P] -> [..., height, width]; what was attended of tokens that stand nowhere is left out."""
    return attention[..., grid.leading :].unflatten(-1, (grid.height, grid.width))
