"""Attention of a language model in bf16 on a CPU, by plain products.

PyTorch's fused kernel needs three times as long for its backward pass in bf16 as these need (docs/log.md).

Legend (suffixes of names): R rows, H heads of queries, K those of keys and values (H is a multiple), L queries, T keys,
C channels of a head.
"""

from __future__ import annotations

from torch import Tensor


def half_attention(
    query_RHLC: Tensor, key_RKTC: Tensor, value_RKTC: Tensor, added_R1LT: Tensor, scale: float
) -> Tensor:
    """Softmax attention, [R, H, L, C] in the dtype of the values; ``added_R1LT`` is added to the scores.

    Scores and their softmax are fp32, as in the fused kernel; the weights are rounded before they meet the values.
    """
    groups = (key_RKTC.shape[1], -1)  # neighbouring heads of queries read the same keys
    queries = query_RHLC.unflatten(1, groups).flatten(2, 3)
    scores = (queries.float() * scale) @ key_RKTC.float().transpose(-1, -2)
    scores = scores.unflatten(2, (-1, query_RHLC.shape[2])) + added_R1LT[:, :, None]
    weights = scores.softmax(-1).to(value_RKTC.dtype)
    return (weights.flatten(2, 3) @ value_RKTC).view_as(query_RHLC)
