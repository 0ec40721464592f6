"""Batches for training and evaluation, in order, from loader processes that hold no state."""

from __future__ import annotations

import math
import mmap
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from model.batch import Batch, Planner, Term
from pipeline.collate import collate
from pipeline.datasets import EvalDataset, SampleReader, TrainDataset
from pipeline.order import SampleOrder, micro_batch_positions
from pipeline.shard_reader import Corpus
from pipeline.tokenizer import TextTokenizer
from pipeline.transforms import DEFAULT_MAX_PIXELS, clip_transform, draft_size

_WORKER_FAILURES = ("timed out", "exited unexpectedly", "killed by signal", "Bus error")


class LoaderError(RuntimeError):
    """A loader process hung or died; the message says which and what to try."""


@dataclass(frozen=True)
class LoaderOptions:
    """How loading runs; no choice here changes a batch, except ``fast_decode``.

    ``prefetch`` counts micro-batches per worker; ``num_workers`` 0 loads in this process; ``timeout_seconds`` is the
    longest wait for one batch.
    """

    num_workers: int = 4
    prefetch: int = 4
    pin_memory: bool = False
    timeout_seconds: float = 300.0
    max_pixels: int = DEFAULT_MAX_PIXELS
    fast_decode: bool = False


@dataclass(frozen=True)
class TrainBatches:
    """Positions of each micro-batch of one rank for steps ``start_step`` .. ``num_steps``-1."""

    start_step: int
    num_steps: int
    rank: int
    world: int
    micro_batch: int
    accumulation: int

    def __len__(self) -> int:
        return max(self.num_steps - self.start_step, 0) * self.accumulation

    def __iter__(self) -> Iterator[range]:
        for step in range(self.start_step, self.num_steps):
            for micro in range(self.accumulation):
                yield micro_batch_positions(step, micro, self.rank, self.world, self.micro_batch, self.accumulation)


class BatchLoader:
    """An iterable of ``Batch`` in order; ``most_batches`` is the largest number any rank gets, so that all ranks can
    agree on a number of collectives. Raises LoaderError when a worker hangs or dies."""

    def __init__(
        self,
        dataset: TrainDataset | EvalDataset,
        batches: Sequence[range] | TrainBatches,
        most_batches: int,
        planner: Planner,
        options: LoaderOptions,
        persistent: bool = False,
    ) -> None:
        self.most_batches = most_batches
        self._options, workers = options, options.num_workers if len(batches) else 0
        image_shape, slots = dataset.reader.image_shape, None
        if workers:
            largest = len(next(iter(batches)))  # the first batch; only the last can be smaller
            slots = _Slots(workers * (options.prefetch + 1), (largest, *image_shape))
        self._slots = slots  # owns the memory that the workers' batches refer to
        self._workers: set[multiprocessing.process.BaseProcess] = set()
        self._loader = DataLoader(
            _BatchMaker(dataset, planner, image_shape, slots),
            batch_size=None,  # the workers make whole batches
            sampler=_Numbered(batches),
            collate_fn=_unchanged,
            num_workers=workers,
            prefetch_factor=options.prefetch if workers else None,
            persistent_workers=persistent and workers > 0,
            pin_memory=options.pin_memory and torch.cuda.is_available(),
            timeout=options.timeout_seconds if workers else 0,
            multiprocessing_context="fork" if workers else None,  # the workers inherit the slots
            generator=torch.Generator().manual_seed(0),  # else starting a loader would move the global generator
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        try:
            for batch in self._started():
                yield batch.unpack() if isinstance(batch, _Parcel) else batch
            self._workers = {worker for worker in self._workers if worker.is_alive()}
        except GeneratorExit:
            raise
        except BaseException as error:
            _kill(self._workers)
            if isinstance(error, RuntimeError) and any(words in str(error) for words in _WORKER_FAILURES):
                raise LoaderError(self._explain(str(error))) from error
            raise

    def _started(self) -> Iterator[Batch | _Parcel]:
        """The DataLoader's iterator, with note taken of the processes that it starts."""
        before = set(multiprocessing.active_children())
        iterator = iter(self._loader)
        self._workers |= set(multiprocessing.active_children()) - before
        return iterator

    def _explain(self, message: str) -> str:
        found = " ".join(message.split("\n")[0].split())
        if "timed out" in message:
            return (
                f"no batch within {self._options.timeout_seconds:g} s ({found}): the storage hangs or is too slow; "
                "check it, or raise data.timeout_seconds"
            )
        return f"a loader process died ({found}): most often out of memory; lower data.num_workers or data.prefetch"


def build_train_loader(
    corpora: Sequence[Corpus],
    order: SampleOrder,
    planner: Planner,
    tokenizer: TextTokenizer,
    *,
    image_size: int,
    max_text_length: int,
    micro_batch: int,
    accumulation: int,
    rank: int,
    world: int,
    start_step: int,
    num_steps: int,
    seed: int,
    options: LoaderOptions,
) -> BatchLoader:
    """Micro-batches of ``rank`` for steps ``start_step`` .. ``num_steps``-1, ``accumulation`` per step, in order.

    Whatever the topology, step s holds the samples at positions [s*G, (s+1)*G) of ``order``, G the global batch.
    """
    reader = _reader(corpora, planner, tokenizer, image_size, max_text_length, options)
    batches = TrainBatches(start_step, num_steps, rank, world, micro_batch, accumulation)
    return BatchLoader(TrainDataset(reader, order, seed), batches, len(batches), planner, options)


def build_eval_loader(
    corpora: Sequence[Corpus],
    planner: Planner,
    tokenizer: TextTokenizer,
    *,
    image_size: int,
    max_text_length: int,
    batch_size: int,
    rank: int,
    world: int,
    seed: int,
    options: LoaderOptions,
    max_samples: int | None = None,
    shuffle_images: bool = False,
) -> BatchLoader:
    """Every chosen sample exactly once over all ranks; batch k belongs to rank k mod world, the last may be smaller.

    Ranks may get different numbers of batches, also none: see ``BatchLoader.most_batches``.
    """
    reader = _reader(corpora, planner, tokenizer, image_size, max_text_length, options)
    dataset = EvalDataset(reader, seed, max_samples, shuffle_images)
    all_batches = [range(start, min(start + batch_size, len(dataset))) for start in range(0, len(dataset), batch_size)]
    most = -(-len(all_batches) // world)
    return BatchLoader(dataset, all_batches[rank::world], most, planner, options, persistent=True)


def _reader(
    corpora: Sequence[Corpus],
    planner: Planner,
    tokenizer: TextTokenizer,
    image_size: int,
    max_text_length: int,
    options: LoaderOptions,
) -> SampleReader:
    return SampleReader(
        corpora=corpora,
        tokenizer=tokenizer,
        transform=clip_transform(image_size),
        max_text_length=max_text_length,
        negative_share=planner.negative_share,
        full_stop=planner.full_stop,
        max_pixels=options.max_pixels,
        draft_size=draft_size(image_size, options.fast_decode),
    )


class _Slots:
    """Shared memory for the images of the batches in flight, without a name that could outlive the run.

    Batch k is written into slot k mod ``num_slots`` by worker k mod num_workers, and copied out before the worker is
    given batch k + prefetch * num_workers, which falls into another slot. Reused pages cost no page faults, and unlike
    a tensor sent through a queue a batch costs no descriptor and nothing of /dev/shm.
    """

    def __init__(self, num_slots: int, shape: tuple[int, ...]) -> None:
        self.num_slots, self.slot_bytes = num_slots, math.prod(shape)
        self.descriptor = os.memfd_create("batches", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, num_slots * self.slot_bytes)
        memory = mmap.mmap(self.descriptor, num_slots * self.slot_bytes)
        self._images = torch.frombuffer(memory, dtype=torch.uint8).view(num_slots, *shape)

    def images(self, number: int, batch_size: int) -> Tensor:
        """Where the images of batch ``number`` go, uint8 [batch_size, I, 3, S, S]."""
        return self._images[number % self.num_slots, :batch_size]

    def __del__(self) -> None:
        os.close(self.descriptor)


class _BatchMaker:
    """What a loader process runs: the positions of a batch to the batch."""

    def __init__(
        self,
        dataset: TrainDataset | EvalDataset,
        planner: Planner,
        image_shape: tuple[int, ...],
        slots: _Slots | None,
    ) -> None:
        self._dataset, self._planner, self._image_shape, self._slots = dataset, planner, image_shape, slots

    def __getitem__(self, numbered: tuple[int, range]) -> Batch | _Parcel:
        number, positions = numbered
        if self._slots is None:
            images = torch.empty((len(positions), *self._image_shape), dtype=torch.uint8)
            return collate(self._dataset.items(positions, images), images, self._planner)
        images = self._slots.images(number, len(positions))
        return _Parcel(collate(self._dataset.items(positions, images), images, self._planner), number, self._slots)


class _Parcel:
    """A batch on its way between processes: its images stay in their slot, the small tensors travel as arrays."""

    def __init__(self, batch: Batch, number: int, slots: _Slots) -> None:
        assert batch.images.is_set_to(slots.images(number, len(batch.images))), "the planner must keep the images"
        self._shape = tuple(batch.images.shape)
        self._place = slots.descriptor, number % slots.num_slots * slots.slot_bytes
        self._arrays = {
            f.name: getattr(batch, f.name).numpy() for f in fields(batch) if _is_small_tensor(batch, f.name)
        }
        self._terms = {name: (term.position.numpy(), term.label.numpy()) for name, term in batch.terms.items()}
        self._lists = (batch.keys, batch.problems)

    def unpack(self, pinned: bool = False) -> Batch:
        """The batch in memory of its own; the slot is free again."""
        images = torch.empty(self._shape, dtype=torch.uint8, pin_memory=pinned)
        _read_fully(self._place, images)
        batch = Batch(
            images=images,
            **{name: torch.from_numpy(array) for name, array in self._arrays.items()},
            terms={name: Term(*map(torch.from_numpy, arrays)) for name, arrays in self._terms.items()},
            keys=self._lists[0],
            problems=self._lists[1],
        )
        return batch.pin_memory() if pinned else batch

    def pin_memory(self) -> Batch:
        """Called by the DataLoader's pinning thread."""
        return self.unpack(pinned=True)


class _Numbered:
    """The batches with their numbers, which choose their slots."""

    def __init__(self, batches: Sequence[range] | TrainBatches) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[int, range]]:
        return enumerate(self._batches)


def _unchanged(batch: Batch | _Parcel) -> Batch | _Parcel:
    return batch


def _read_fully(place: tuple[int, int], images: Tensor) -> None:
    """Fill ``images`` from (descriptor, offset): the kernel copies, which takes fewer page faults than a mapping."""
    descriptor, offset = place
    buffer = memoryview(images.numpy()).cast("B")
    while buffer:
        count = os.preadv(descriptor, [buffer], offset)
        assert count > 0, "slots are as long as they were made"
        buffer, offset = buffer[count:], offset + count


def _is_small_tensor(batch: Batch, name: str) -> bool:
    return name != "images" and isinstance(getattr(batch, name), Tensor)


def _kill(workers: set[multiprocessing.process.BaseProcess]) -> None:
    """Ends workers that may hang, which would keep the program from ending; torch need not hear of their deaths."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if in_main_thread else None
    for worker in workers:
        worker.kill()
        worker.join(timeout=5)
    if in_main_thread:
        signal.signal(signal.SIGCHLD, handler)
