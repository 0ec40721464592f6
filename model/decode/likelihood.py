"""How probable whole captions are: one pass over all of their words.

Legend: B images, P image tokens, D width, M targets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from model.batch import Batch, Row
from model.evlgen import EVLGen
from model.plans.builder import PlanBuilder, padded_length
from model.plans.captions import CaptionForm


def log_probabilities(
    objective: nn.Module, tokens: Tensor, captions: Sequence[Sequence[int]], max_tokens: int, num_prompt: int = 0
) -> Tensor:
    """Log probability of one caption an image: of its words after the prompt, and of its end.

    A caption of ``max_tokens`` words was cut by the search that found it, so its end is left out. With the release's
    form the end is ``<eos>``.

    Args:
        objective: as of :func:`~model.decode.stream.decoder_of`; gradients flow where they are enabled.
        tokens: [B, P, D] of the images, as the network's ``encode`` gives them.
        captions: B lists of word ids, the first ``num_prompt`` of which are only read.
        max_tokens: of the search.
        num_prompt: words of the prompt.

    Returns:
        fp32 [B].
    """
    return _sums(objective, tokens, captions, max_tokens, num_prompt)[0]


def mean_log_probabilities(
    objective: nn.Module, tokens: Tensor, captions: Sequence[Sequence[int]], num_prompt: int = 0
) -> Tensor:
    """Log probability a token of one caption an image, its end among them, fp32 [B]; arguments as above."""
    sums, counts = _sums(objective, tokens, captions, 1 + max(map(len, captions)), num_prompt)
    return sums / torch.tensor(counts, device=sums.device)


def _sums(
    objective: nn.Module, tokens: Tensor, captions: Sequence[Sequence[int]], max_tokens: int, num_prompt: int
) -> tuple[Tensor, list[int]]:
    """Log probability of each caption fp32 [B], and of how many tokens that is."""
    net = objective.net
    images = torch.zeros((len(captions), 1), dtype=torch.uint8)  # a plan asks for their number only
    planned = _of_language_model if isinstance(net, EVLGen) else _of_stream
    batch, counts = planned(objective, images, captions, max_tokens, num_prompt)
    batch = batch.to(tokens.device)
    term = batch.terms["caption"]
    states = getattr(net.fuse(batch.plan, tokens), term.source).index_select(0, term.position)
    losses, _ = objective.lm_head(states, term.target)
    caption_M = torch.repeat_interleave(
        torch.arange(len(captions), device=tokens.device),
        torch.tensor(counts, device=tokens.device),
        output_size=sum(counts),
    )
    return losses.new_zeros(len(captions)).index_add(0, caption_M, -losses), counts


def _of_stream(
    objective: nn.Module, images: Tensor, captions: Sequence[Sequence[int]], max_tokens: int, num_prompt: int
) -> tuple[Batch, list[int]]:
    """The plan of captions that the l2r stream predicts, and how many targets each has."""
    net = objective.net
    form = getattr(objective, "form", CaptionForm(net.vocabulary))
    first = int(net.released)  # the release's `<s>` is seen by no word
    num_read = 1 + len(form.begin) + num_prompt
    rows = [Row(form.write(words, len(words) + 8), number, 0) for number, words in enumerate(captions)]
    builder = PlanBuilder(padded_length(rows), {"caption": ("l2r", "token")})
    counts = []
    for number, (row, words) in enumerate(zip(rows, captions, strict=True)):
        ids = np.array(row.token_ids)
        targets = np.arange(num_read, 1 + len(form.begin) + len(words) + (len(words) < max_tokens))
        states = builder.add_states("l2r", number, np.arange(first, max(len(ids) - 1, first + 1)))
        builder.add_targets("caption", states[targets - 1 - first], ids[targets])
        counts.append(len(targets))
    return builder.build(images, rows, net.vocabulary), counts


def _of_language_model(
    objective: nn.Module, images: Tensor, captions: Sequence[Sequence[int]], max_tokens: int, num_prompt: int
) -> tuple[Batch, list[int]]:
    """The same of EVLGen's."""
    form, rows = objective.form, []
    for number, words in enumerate(captions):
        end = form.end if len(words) < max_tokens else ()
        rows.append(Row([*form.begin, *words, *end], number, 0, target=len(form.begin) + num_prompt))
    return objective.planner(images, rows), [len(row.token_ids) - row.target for row in rows]
