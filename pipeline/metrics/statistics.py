"""How far a mean over test items may be off: its standard error, also where items come in groups."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np


def standard_error(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> float | None:
    """Standard error of the mean of ``values``; None for fewer than two values or clusters.

    ``clusters`` names the group of each value, say its image, where the values of a group depend on each other: then
    the groups are what was drawn at random, and the error is that of Liang and Zeger (Biometrika 73, 1986), with the
    factor G/(G-1) for G groups. With groups of one it is the usual one. Raises ValueError for unequal lengths.
    """
    if clusters is not None and len(clusters) != len(values):
        raise ValueError(f"{len(values)} values, {len(clusters)} clusters: expected one cluster for each value")
    numbers = np.asarray(values, dtype=np.float64)
    if clusters is None:
        groups = np.arange(len(numbers))
    else:
        index: dict[Hashable, int] = {}
        groups = np.array([index.setdefault(cluster, len(index)) for cluster in clusters], dtype=np.int64)
    num_groups = int(groups.max()) + 1 if len(groups) else 0
    if num_groups < 2:
        return None
    residuals = np.bincount(groups, weights=numbers - numbers.mean())
    return math.sqrt(num_groups / (num_groups - 1) * float(residuals @ residuals)) / len(numbers)
