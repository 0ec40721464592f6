"""Captions from a masked language model: all words at once, then the least certain ones again and again.

Mask-Predict (Ghazvininejad, Levy, Liu, Zettlemoyer 2019, arXiv 1904.09324, section 3). Legend: B images, C lengths,
G = B*C sequences, T padded length, N states, M hidden words, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from model.batch import Batch, Row
from model.config import Vocabulary
from model.plans.builder import PlanBuilder, round_up
from model.towers import encode_images

ITERATIONS = 10  # the paper's
ROWS_AT_ONCE = 1024  # of the vocabulary head, whose logits are [rows, V]


@torch.no_grad()
def mask_predict(
    objective: nn.Module, images: Tensor, lengths: Sequence[int], iterations: int = ITERATIONS
) -> list[list[int]]:
    """For every image the most probable of the captions that have one of ``lengths``.

    A caption of n words starts as n times `<mask>`. Iteration t = 0 .. ``iterations``-1 hides the floor(n (1 - t/T))
    words that are least probable so far and predicts them from the others and the image, each by itself; words that
    stay keep the probability they were predicted with. The caption with the highest mean log probability wins, the
    first of ``lengths`` among equals.

    # NOTE paper: a length token predicts the lengths to try; here: the caller names them.

    Ranks that share one network (ZeRO-3) must bring equally many images, lengths and iterations.

    Args:
        objective: a :class:`~model.objectives.pretraining.Pretraining` in eval mode, of the objective mlm.
        images: uint8 [B, 1, 3, S, S] on the model's device.
        lengths: numbers of words (tokens without `<s>` and `</s>`) to try for every image.
        iterations: T; 1 predicts every word from the image alone.

    Returns:
        Word ids of each caption, special tokens left out.

    Raises:
        ValueError: another objective, a length outside the position table, no length, no iteration.
    """
    _check(objective, lengths, iterations)
    net, vocabulary = objective.net, objective.net.vocabulary
    batch = _hidden_captions(images, lengths, vocabulary)
    plan, tokens = batch.plan, encode_images(net, images)
    is_word = plan.text == vocabulary.mask_id
    log_probability = torch.zeros(plan.text.shape, dtype=torch.float32, device=images.device)
    for iteration in range(iterations):
        num_hidden = [length * (iterations - iteration) // iterations for length in lengths] * len(images)
        if not any(num_hidden):
            break
        hidden = _least_probable(log_probability, is_word, torch.tensor(num_hidden, device=images.device))
        plan.text = plan.text.masked_fill(hidden, vocabulary.mask_id)
        chosen = hidden.flatten()[plan.l2r_index]
        ids, values = _predicted(objective, net.fuse(plan, tokens).l2r[chosen])
        plan.text = plan.text.masked_scatter(hidden, ids)  # states stand in the order of the grid
        log_probability = log_probability.masked_scatter(hidden, values)
    means = (log_probability * is_word).sum(1) / is_word.sum(1)
    best = means.view(len(images), len(lengths)).argmax(1)
    words = plan.text.view(len(images), len(lengths), -1)[torch.arange(len(best), device=best.device), best]
    found = zip(best.tolist(), words.tolist(), strict=True)
    return [row[1 : lengths[choice] + 1] for choice, row in found]


def _check(objective: nn.Module, lengths: Sequence[int], iterations: int) -> None:
    if objective.name != "mlm":
        raise ValueError(f"mask_predict needs an mlm model, found {objective.name}; use model.decode.search")
    limit = objective.net.embedding.position.num_embeddings - 4  # row 2 is the first token's; `<s>` and `</s>`
    if not lengths or not 1 <= min(lengths) <= max(lengths) <= limit:
        raise ValueError(f"caption lengths are {list(lengths)}, expected at least one, each from 1 to {limit}")
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}, expected at least 1")


def _hidden_captions(images: Tensor, lengths: Sequence[int], vocabulary: Vocabulary) -> Batch:
    """For each image a row `<s> <mask> .. </s>` of each length, all states computed, on the images' device."""
    builder, rows = PlanBuilder(round_up(max(lengths) + 2), {}), []
    for image in range(len(images)):
        for length in lengths:
            ids = [vocabulary.bos_id, *[vocabulary.mask_id] * length, vocabulary.eos_id]
            builder.add_states("l2r", len(rows), np.arange(len(ids)))
            rows.append(Row(ids, image, seed=0, role="read"))
    prefix = [len(row.token_ids) for row in rows]
    return builder.build(images, rows, vocabulary, prefix).to(images.device)


def _least_probable(log_probability: Tensor, is_word: Tensor, count: Tensor) -> Tensor:
    """bool [G, T]: in each row the ``count`` int64 [G] words of least log probability [G, T], the first of equals."""
    order = log_probability.masked_fill(~is_word, float("inf")).argsort(dim=1, stable=True)
    place = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return place < count[:, None]


def _predicted(objective: nn.Module, states: Tensor) -> tuple[Tensor, Tensor]:
    """The most probable word int64 [M] of each state [M, D] and its log probability fp32 [M]."""
    found = []
    for part in states.split(ROWS_AT_ONCE):
        logits = objective.lm_head.logits(part).float()
        logits[:, list(objective.net.vocabulary.special_ids)] = float("-inf")
        found.append(logits.log_softmax(-1).max(-1))
    return torch.cat([one.indices for one in found]), torch.cat([one.values for one in found])
