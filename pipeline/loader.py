"""Batches for training and evaluation, in order, from loader processes that hold no state."""

from __future__ import annotations

import multiprocessing
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader, get_worker_info

from model.batch import Batch, Planner, Term
from pipeline.collate import Item, collate
from pipeline.datasets import EvalDataset, SampleReader, TrainDataset
from pipeline.order import SampleOrder, micro_batch_positions
from pipeline.shard_reader import Corpus
from pipeline.tokenizer import TextTokenizer
from pipeline.transforms import DEFAULT_MAX_PIXELS, clip_transform, draft_size

_SHARED_MEMORY = Path("/dev/shm")
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
        batches: Sequence[Sequence[int]] | TrainBatches,
        most_batches: int,
        planner: Planner,
        options: LoaderOptions,
        persistent: bool = False,
    ) -> None:
        self.most_batches = most_batches
        self._options, workers = options, options.num_workers
        corpora, image_size = dataset.reader.corpora, dataset.reader.transform.size
        num_images = {corpus.num_images for corpus in corpora}
        if len(num_images) > 1:
            raise ValueError(f"corpora of {sorted(num_images)} images per sample: expected the same number in all")
        collate_fn = partial(collate, planner=planner, image_size=image_size, num_images=max(num_images))
        self._loader = DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=_CollateForTransport(collate_fn),
            num_workers=workers,
            prefetch_factor=options.prefetch if workers else None,
            persistent_workers=persistent and workers > 0,
            pin_memory=options.pin_memory and torch.cuda.is_available(),
            timeout=options.timeout_seconds if workers else 0,
            generator=torch.Generator().manual_seed(0),  # else starting a loader would move the global generator
        )
        if workers and len(self._loader):
            largest = max(len(batch) for batch in batches) if isinstance(batches, list) else batches.micro_batch
            _check_shared_memory(options, largest * max(num_images) * 3 * image_size**2)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        before = set(multiprocessing.active_children())
        try:
            for batch in self._loader:
                yield batch.unpack() if isinstance(batch, _Parcel) else batch
        except RuntimeError as error:
            if not any(words in str(error) for words in _WORKER_FAILURES):
                raise
            _kill(set(multiprocessing.active_children()) - before)
            raise LoaderError(self._explain(str(error))) from error

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


class _CollateForTransport:
    """Collates, and in a loader process packs the batch for its way through the pipe."""

    def __init__(self, collate_fn: partial) -> None:
        self._collate = collate_fn

    def __call__(self, items: Sequence[Item]) -> Batch | _Parcel:
        batch = self._collate(items)
        return batch if get_worker_info() is None else _Parcel(batch)


class _Parcel:
    """A batch on its way between processes: images in shared memory, the small tensors inline as arrays.

    A tensor costs a file descriptor on either side for as long as it lives; with twenty per batch, prefetching
    exhausts the usual limit of 1024.
    """

    def __init__(self, batch: Batch) -> None:
        self._images = batch.images
        self._arrays = {
            f.name: getattr(batch, f.name).numpy() for f in fields(batch) if _is_small_tensor(batch, f.name)
        }
        self._terms = {name: (term.position.numpy(), term.label.numpy()) for name, term in batch.terms.items()}
        self._lists = (batch.keys, batch.problems)

    def unpack(self) -> Batch:
        return Batch(
            images=self._images,
            **{name: torch.from_numpy(array) for name, array in self._arrays.items()},
            terms={name: Term(*map(torch.from_numpy, arrays)) for name, arrays in self._terms.items()},
            keys=self._lists[0],
            problems=self._lists[1],
        )

    def pin_memory(self) -> Batch:
        """Called by the DataLoader's pinning thread."""
        return self.unpack().pin_memory()


def _is_small_tensor(batch: Batch, name: str) -> bool:
    return name != "images" and isinstance(getattr(batch, name), torch.Tensor)


def _kill(workers: set[multiprocessing.process.BaseProcess]) -> None:
    """Ends workers that hang, which would keep the program from ending; torch need not be told of their deaths."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if in_main_thread else None
    for worker in workers:
        worker.kill()
        worker.join(timeout=5)
    if in_main_thread:
        signal.signal(signal.SIGCHLD, handler)


def _check_shared_memory(options: LoaderOptions, batch_bytes: int) -> None:
    """Refuses prefetching that cannot fit: overflowing /dev/shm kills workers by a bus error much later."""
    if not _SHARED_MEMORY.is_dir():
        return
    needed = batch_bytes * options.prefetch * options.num_workers
    free = shutil.disk_usage(_SHARED_MEMORY).free
    if needed > free:
        raise ValueError(
            f"prefetching {options.num_workers} x {options.prefetch} batches needs {needed / 2**20:.0f} MiB of shared "
            f"memory, {_SHARED_MEMORY} has {free / 2**20:.0f}: lower data.num_workers or data.prefetch, "
            "or give the container more (docker run --shm-size)"
        )
