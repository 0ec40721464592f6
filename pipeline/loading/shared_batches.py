"""Sends batches from loader processes to the training process: images in shared memory, the rest through a pipe."""

from __future__ import annotations

import math
import mmap
import os
import weakref
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from model.batch import Batch


class ImagePool:
    """Anonymous shared memory for the images of batches in flight, one slot per batch; create it before workers fork.

    A slot is allocated when a batch is requested and freed when the last tensor over it is garbage collected. Reused
    pages cost no page faults, and unlike a tensor sent through a queue a batch costs no copy and no file descriptor.
    Each worker has its own slots, so that it maps few pages. A batch without a free slot is sent by torch's queue.
    """

    def __init__(self, num_workers: int, slots_per_worker: int, shape: tuple[int, ...]) -> None:
        num_slots = num_workers * slots_per_worker
        self._num_workers, self._slot_bytes = num_workers, math.prod(shape)
        self.descriptor = os.memfd_create("batches", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, num_slots * self._slot_bytes)
        memory = mmap.mmap(self.descriptor, num_slots * self._slot_bytes)
        self._images = np.frombuffer(memory, dtype=np.uint8).reshape(num_slots, *shape)
        self._lent: set[int] = set()
        self._free: list[deque[int]] = []
        self.reclaim()

    def reclaim(self) -> None:
        """Free every slot without a living tensor; call it only when no batch is in flight."""
        slots = [slot for slot in range(len(self._images)) if slot not in self._lent]
        self._free = [deque(slots[worker :: self._num_workers]) for worker in range(self._num_workers)]

    def take(self, number: int) -> int | None:
        """A slot for batch ``number``, which goes to worker number mod num_workers; None if all of them are in use."""
        free = self._free[number % self._num_workers]
        return free.popleft() if free else None

    def give_back(self, slot: int) -> None:
        self._lent.discard(slot)
        self._free[slot % self._num_workers].append(slot)

    def images(self, slot: int, batch_size: int) -> Tensor:
        """The slot as a tensor for a worker to fill: uint8 [batch_size, I, 3, S, S]."""
        return torch.from_numpy(self._images[slot, :batch_size])

    def lend(self, slot: int, batch_size: int) -> Tensor:
        """The slot as a tensor for the training process; it is freed with the last of the tensor and its views."""
        view = self._images[slot, :batch_size]
        self._lent.add(slot)
        weakref.finalize(view, self.give_back, slot).atexit = False
        return torch.from_numpy(view)

    def offset(self, slot: int) -> int:
        """Byte offset of the slot in ``descriptor``."""
        return slot * self._slot_bytes

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class SlotSampler:
    """A DataLoader's sampler: yields (slot, positions) of each batch; it runs in the training process."""

    def __init__(self, batches: Sequence[range], pool: ImagePool | None) -> None:
        self._batches, self._pool = batches, pool

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[int | None, range]]:
        for number, positions in enumerate(self._batches):
            yield (None if self._pool is None else self._pool.take(number)), positions


class SharedBatch:
    """A batch to be pickled: its images stay in their slot (without one torch sends them), small tensors are arrays."""

    def __init__(self, batch: Batch, slot: int | None, pool: ImagePool) -> None:
        self._slot, self._shape = slot, tuple(batch.images.shape)
        self._images = batch.images if slot is None else None
        self._place = (pool.descriptor, 0 if slot is None else pool.offset(slot))
        self._rest = batch.with_images(None, Tensor.numpy)
        self._pinned = False

    def unpack(self, pool: ImagePool) -> Batch:
        """The batch, in the process that owns ``pool``."""
        if self._images is None:
            images = pool.lend(self._slot, self._shape[0])
        else:
            images = self._images
            if self._slot is not None:
                pool.give_back(self._slot)
        batch = self._rest.with_images(images, torch.from_numpy)
        return batch.pin_memory() if self._pinned else batch

    def pin_memory(self) -> SharedBatch:
        """Copy the images into page-locked memory; the DataLoader's pinning thread calls it."""
        if self._images is None:
            images = torch.empty(self._shape, dtype=torch.uint8, pin_memory=True)
            _read_fully(self._place, images)
        else:
            images = self._images.pin_memory()
        self._images, self._pinned = images, True
        return self


def _read_fully(place: tuple[int, int], images: Tensor) -> None:
    descriptor, offset = place
    buffer = memoryview(images.numpy()).cast("B")
    while buffer:
        count = os.preadv(descriptor, [buffer], offset)
        assert count > 0, "the pool is as long as it was made"
        buffer, offset = buffer[count:], offset + count
