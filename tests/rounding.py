"""How far two right computations of the same numbers may lie apart, from their dtype and the length of their sums."""

from __future__ import annotations

import math

import torch

# Of computations in double: some 10,000 roundings of 2^-53 in a row, with a factor of 1,000 for values that cancel.
DOUBLE = 1e-9


def rounding(*terms: int, dtype: torch.dtype = torch.float32) -> float:
    """Largest difference of numbers of order 1 that come from sums of so many ``terms`` each, one upon the other.

    A processor adds in an order of its own. Each addition is off by eps / 2 at most, up or down: n of them by
    sqrt(n) * eps / 2, and none of a million values by more than five times that. Both sides of a comparison are.
    """
    return 2 * 5 * math.sqrt(sum(terms)) * torch.finfo(dtype).eps / 2


# A network of tests.tiny_flm: patches of 768 values; of each of 3 + 4 + 2 layers the projections (32 wide), the
# feed-forward layer (64 wide) and what is attended to (24 words, 4 patches); 61 words at the end.
TINY = rounding(768, *[32 * 6 + 64 + 24 + 4] * 9, 61)
# The released networks that the fixtures come from: patches of 3,072 values, 4 layers 128 wide, 6 + 3 layers 64 wide
# with feed-forward layers of 512 and 256, 292 words.
RELEASED = rounding(3072, *[128 * 4 + 512 + 10] * 4, *[64 * 6 + 256 + 16 + 10] * 9, 292)
