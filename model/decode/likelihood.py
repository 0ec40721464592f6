"""How probable whole captions are: one pass over all of their words.

Legend: B images, P image tokens, D width, M targets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from model.batch import Row
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
    net = objective.net
    by_language_model = isinstance(net, EVLGen)
    form = getattr(objective, "form", None) or CaptionForm(net.vocabulary)
    before = len(form.begin) + (not by_language_model)  # tokens of a row before its words; FLM's begin with `<s>`
    rows = [Row(form.write(words, len(words) + 8), number, 0) for number, words in enumerate(captions)]
    builder = PlanBuilder(padded_length(rows), {"caption": ("before" if by_language_model else "l2r", "token")})
    counts = []
    for number, (row, words) in enumerate(zip(rows, captions, strict=True)):
        ids = np.array(row.token_ids)
        targets = np.arange(before + num_prompt, before + len(words) + (len(words) < max_tokens))
        if by_language_model:
            places = number * builder.num_positions + targets
        else:
            first = int(net.released)  # the release's `<s>` is seen by no word
            states = builder.add_states("l2r", number, np.arange(first, max(len(ids) - 1, first + 1)))
            places = states[targets - 1 - first]
        builder.add_targets("caption", places, ids[targets])
        counts.append(len(targets))
    images = torch.zeros((len(rows), 1), dtype=torch.uint8)  # the plan asks for their number only
    batch = builder.build(images, rows, net.vocabulary).to(tokens.device)
    term = batch.terms["caption"]
    states = getattr(net.fuse(batch.plan, tokens), term.source).index_select(0, term.position)
    losses, _ = objective.lm_head(states, term.target)
    caption_M = torch.repeat_interleave(
        torch.arange(len(rows), device=tokens.device),
        torch.tensor(counts, device=tokens.device),
        output_size=sum(counts),
    )
    return losses.new_zeros(len(rows)).index_add(0, caption_M, -losses)
