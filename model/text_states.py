"""What texts are before they meet an image: means over their words of the states behind the bottom half.

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
    OneStream, and is run once, on an image of one token that no such state has seen.
    """
    output = net.fuse(plan, net.text_projection.weight.new_zeros(1, 1, net.text_projection.out_features))
    return mean_of_words(output.bottom, packed_index(plan), plan)


def packed_index(plan: TextPlan) -> Tensor:
    """Flat positions row*T+position of all states as networks order them, int64 [N]: row by row, l2r before r2l."""
    index = torch.cat([plan.l2r_index, plan.r2l_index])
    return index[(index // plan.text.shape[1]).argsort(stable=True)]


def mean_of_words(states: Tensor, index: Tensor, plan: TextPlan) -> Tensor:
    """Means over each row's words of ``states`` [N, D], which stand at flat positions ``index`` int64 [N].

    Returns:
        fp32 [R, D], with gradient; 0 of a row of whose words there is no state.
    """
    (num_rows, num_positions), states = plan.text.shape, states.float()
    row, position = index // num_positions, index % num_positions
    is_word = ((position >= 1) & (position < plan.lengths[row] - 1)).float()
    total = states.new_zeros(num_rows, states.shape[1]).index_add(0, row, states * is_word[:, None])
    return total / is_word.new_zeros(num_rows).index_add(0, row, is_word).clamp(min=1)[:, None]
