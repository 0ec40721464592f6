"""What texts are before they meet an image, recorded while a network runs.

Legend: N packed states, R text rows, T padded text length, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.batch import TextPlan


@torch.no_grad()
def mean_text_states(net: nn.Module, plan: TextPlan) -> Tensor:
    """The mean over each text's words of their states behind the bottom half, fp32 [R, D]; 0 of a text without words.

    Where a word has a state in both streams both count. ``plan`` has all its rows about one image; ``net`` is FLM or
    OneStream, and is run once, on an image of one token that no recorded state has seen.
    """
    recorded: list[Tensor] = []
    hook = net.text_projection.register_forward_pre_hook(lambda _, inputs: recorded.append(inputs[0]))
    try:
        net.fuse(plan, net.text_projection.weight.new_zeros(1, 1, net.text_projection.out_features))
    finally:
        hook.remove()
    (num_rows, num_positions), states = plan.text.shape, recorded[0].float()
    index = torch.cat([plan.l2r_index, plan.r2l_index])
    index = index[(index // num_positions).argsort(stable=True)]  # row by row, l2r before r2l: the order of the states
    row, position = index // num_positions, index % num_positions
    is_word = ((position >= 1) & (position < plan.lengths[row] - 1)).float()
    total = states.new_zeros(num_rows, states.shape[1]).index_add(0, row, states * is_word[:, None])
    return total / is_word.new_zeros(num_rows).index_add(0, row, is_word).clamp(min=1)[:, None]
