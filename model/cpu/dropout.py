"""Dropout on a CPU, with cheaper random numbers than PyTorch's own."""

from __future__ import annotations

import torch
from torch import Tensor


def dropout_factors(shape: torch.Size, rate: float, dtype: torch.dtype) -> Tensor:
    """What dropout multiplies by: 0 with probability ``rate``, else 1 / (1 - ``rate``).

    Drawing the numbers is what costs on a CPU, so four elements share a 64-bit draw; the rate is then met to the next
    1/65536. The comparison writes numbers at once: as booleans they would have to be converted, which takes longer.
    """
    num_elements = shape.numel()
    draws = torch.empty(-(-num_elements // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    draws = draws[:num_elements].view(shape)
    kept = torch.ge(draws, round(rate * 2**16) - 2**15, out=torch.empty(shape, dtype=dtype))
    return kept.mul_(1 / (1 - rate))
