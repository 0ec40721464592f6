"""How batches travel from loader processes: images in reused shared memory, the small rest through the pipe."""

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


class Slots:
    """Shared memory for the images of batches in flight, made before the workers are forked, without a name that could
    outlive the run.

    A slot is taken when a batch is asked for, and free again when the last tensor that shows it is dropped. Reused
    pages cost no page faults, and unlike a tensor sent through a queue a batch costs no copy and no descriptor. Each
    worker has slots of its own, so that it maps few pages. When none is free a batch takes torch's slower way.
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
        """Call when nothing is in flight: every slot is free that nobody looks at."""
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
        """The slot, for a worker to write into: uint8 [batch_size, I, 3, S, S]."""
        return torch.from_numpy(self._images[slot, :batch_size])

    def lend(self, slot: int, batch_size: int) -> Tensor:
        """The slot, for the main process to read; it is given back when the tensor and all its views are gone."""
        view = self._images[slot, :batch_size]
        self._lent.add(slot)
        weakref.finalize(view, self.give_back, slot).atexit = False
        return torch.from_numpy(view)

    def place(self, slot: int) -> int:
        """Byte offset of the slot in ``descriptor``."""
        return slot * self._slot_bytes

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class Numbered:
    """A sampler: the batches, each with the slot it shall use; runs in the main process as batches are asked for."""

    def __init__(self, batches: Sequence[range], slots: Slots | None) -> None:
        self._batches, self._slots = batches, slots

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[int | None, range]]:
        for number, positions in enumerate(self._batches):
            yield (None if self._slots is None else self._slots.take(number)), positions


class Parcel:
    """A batch on its way: its images stay in their slot (or travel by torch's way), small tensors go as arrays."""

    def __init__(self, batch: Batch, slot: int | None, slots: Slots) -> None:
        self._slot, self._shape = slot, tuple(batch.images.shape)
        self._images = batch.images if slot is None else None
        self._place = (slots.descriptor, 0 if slot is None else slots.place(slot))
        self._rest = batch.with_images(None, Tensor.numpy)
        self._pinned = False

    def unpack(self, slots: Slots) -> Batch:
        """The batch, in the process that owns ``slots``."""
        if self._images is None:
            images = slots.lend(self._slot, self._shape[0])
        else:
            images = self._images
            if self._slot is not None:
                slots.give_back(self._slot)
        batch = self._rest.with_images(images, torch.from_numpy)
        return batch.pin_memory() if self._pinned else batch

    def pin_memory(self) -> Parcel:
        """Called by the DataLoader's pinning thread: copies the images into page-locked memory."""
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
        assert count > 0, "slots are as long as they were made"
        buffer, offset = buffer[count:], offset + count
