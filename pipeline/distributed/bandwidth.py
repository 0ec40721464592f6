"""How fast ranks reach each other: bytes a second of an all-reduce, and the offset of each rank's clock."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from pipeline.distributed.ranks import Agreement

ROUNDS = 5


def all_reduce_bytes_per_second(num_bytes: int, device: torch.device) -> float:
    """Bytes of the tensor a second, of the fastest of some rounds; every rank must call it, at the same time."""
    tensor = torch.zeros(num_bytes // 4, device=device)
    seconds = []
    for _ in range(ROUNDS):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(tensor)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return num_bytes / min(seconds)


def clock_offset_seconds(agreement: Agreement) -> float:
    """How far this rank's clock is ahead of rank 0's, or behind (negative); every rank must call it.

    The ranks read their clocks right after a barrier: the smallest difference of some rounds is the least disturbed.
    """
    offsets = []
    for _ in range(ROUNDS):
        agreement.wait()
        own = time.time()
        offsets.append(own - agreement.gather(own)[0])
    return min(offsets, key=abs)
