"""Memory for the one large tensor that a module needs anew in every step, on a CPU."""

from __future__ import annotations

import weakref

import numpy as np
import torch
from torch import Tensor

SMALLEST = 32 << 20  # bytes; what is smaller the C library can keep itself (``M_MMAP_THRESHOLD``)


class KeptMemory:
    """Hands out the same memory again and again, where the C library would ask the system for it in every step.

    A large block goes back to the system when it is freed, and every page of the next one must be faulted in and
    cleared: for a gradient of [50265, 768] that takes several times as long as to write it. Here a block
    is free again when the last tensor on it has died, whoever held it; as long as one lives, another block is given.
    """

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def __reduce__(self) -> tuple[type, tuple]:
        return KeptMemory, ()  # a copy of its owner, pickled or deep, begins without memory

    def empty(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A contiguous tensor of undefined content."""
        num_bytes = shape.numel() * dtype.itemsize
        if device.type != "cpu" or num_bytes < SMALLEST:
            return torch.empty(shape, dtype=dtype, device=device)
        block = self._free.pop() if self._free else None
        if block is None or block.nbytes != num_bytes:
            block = np.empty(num_bytes, dtype=np.uint8)
        lent = block.view()  # dies with the last tensor, while the block lives on
        weakref.finalize(lent, self._free.append, block).atexit = False
        return torch.from_numpy(lent).view(dtype).view(shape)
