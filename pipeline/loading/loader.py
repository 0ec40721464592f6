"""Batches for training and evaluation, in order, from loader processes that hold no state."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, get_worker_info

from model.batch import Batch, Planner
from pipeline.data.open_shards import DataError, OutOfDescriptors
from pipeline.data.order import SampleOrder
from pipeline.data.shard_reader import Corpus
from pipeline.data.transforms import DEFAULT_MAX_PIXELS, clip_transform, draft_size
from pipeline.distributed.endings import EXIT_MEND, EXIT_REQUEUE, MachineFailure, host_name
from pipeline.loading.batch_positions import EvalBatches, TrainBatches
from pipeline.loading.collate import collate
from pipeline.loading.datasets import EvalDataset, EvalImages, Preparation, SampleReader, TrainDataset
from pipeline.loading.shared_batches import ImagePool, SharedBatch, SlotSampler
from pipeline.loading.worker_positions import WorkerPositions
from pipeline.pictures.augmentation import augment_named
from pipeline.pictures.frame_choice import FrameChoice, head_tail, uniform
from pipeline.pictures.pictures import Pictures

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_KILL_SECONDS = 5.0
_WORKER_FAILURES = ("timed out", "exited unexpectedly", "killed by signal", "Bus error")


class LoaderError(MachineFailure):
    """A loader process hung or died, or the data is gone; the message says which and what to try."""


@dataclass(frozen=True)
class Failure:
    """Comes in place of a batch when a process cannot go on; no batch follows."""

    reason: str
    code: int  # of the process that ends by it


@dataclass(frozen=True)
class LoaderOptions:
    """How loading runs; no choice here changes a batch, except ``fast_decode``, ``augmentation`` and ``frames``.

    ``prefetch`` counts micro-batches per worker; ``num_workers`` 0 loads in this process; ``timeout_seconds`` is the
    longest wait for one batch. ``fast_decode`` lets the JPEG decoder shrink large images and resizes by vector
    instructions: pixels differ from the exact transform by rounding, and by little more where the decoder shrank.
    ``augmentation`` acts on training samples alone. ``frames`` of each clip are seen, None where samples hold images.
    """

    num_workers: int = 4
    prefetch: int = 4
    pin_memory: bool = False
    timeout_seconds: float = 180.0
    max_pixels: int = DEFAULT_MAX_PIXELS
    fast_decode: bool = False
    augmentation: str = "none"
    frames: int | None = None


class BatchLoader:
    """An iterable of ``Batch`` in order; ``most_batches`` is the largest number any rank gets, so that all ranks can
    agree on a number of collectives. Raises LoaderError when a worker hangs or dies."""

    def __init__(
        self,
        dataset: TrainDataset | EvalDataset,
        batches: EvalBatches | TrainBatches,
        planner: Planner,
        options: LoaderOptions,
        held_batches: int = 1,
        persistent: bool = False,
    ) -> None:
        """``held_batches``: how many batches the caller keeps at a time; ``persistent`` keeps the workers for the next
        iteration, which saves a fork of this process (docs/scale.md)."""
        self.most_batches = batches.most
        self._dataset, self._batches, self._planner, self._options = dataset, batches, planner, options
        self._num_workers = options.num_workers if len(batches) else 0
        self._held_batches, self._persistent = held_batches, persistent and self._num_workers > 0
        self._image_shape = dataset.reader.image_shape
        self._kept: tuple[DataLoader, ImagePool | None] | None = None
        self._workers: set[multiprocessing.process.BaseProcess] = set()
        self._worker_positions = WorkerPositions(max(self._num_workers, 1))

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def dataset(self) -> TrainDataset | EvalDataset:
        """What turns positions into samples."""
        return self._dataset

    def without(self, done: Collection[int]) -> BatchLoader:
        """A loader of an evaluation that leaves out the positions ``done``; every rank must leave out the same."""
        left = self._batches.without(done)
        return BatchLoader(self._dataset, left, self._planner, self._options, persistent=self._persistent)

    def __iter__(self) -> Iterator[Batch]:
        try:
            iterator, pool = self._started()
            for batch in iterator if self._num_workers else self._watched(iterator):
                if isinstance(batch, Failure):
                    error = LoaderError(batch.reason)
                    error.code = batch.code
                    raise error
                yield batch.unpack(pool) if isinstance(batch, SharedBatch) else batch
            del iterator
            self._workers = {worker for worker in self._workers if worker.is_alive()}
        except GeneratorExit:  # left early: workers that nobody keeps end at once, whatever they are doing
            if not self._persistent:
                self.close()
            raise
        except BaseException as error:
            failure = self.failure(error)
            _kill(self._workers)
            if failure is not None and failure is not error:
                raise failure from error
            raise

    def failure(self, error: BaseException) -> LoaderError | None:
        """What went wrong in loading, if ``error`` comes from there: torch reports the death of a loader process
        wherever the program happens to be."""
        if isinstance(error, LoaderError):
            return error
        if isinstance(error, RuntimeError) and any(words in str(error) for words in _WORKER_FAILURES):
            return LoaderError(self._explain(" ".join(str(error).split("\n")[0].split())))
        return None

    def close(self) -> None:
        """End the loader processes, also in the middle of a batch; a later iteration starts new ones."""
        _kill(self._workers)
        self._workers.clear()
        self._kept = None

    def _started(self) -> tuple[Iterator[Batch | SharedBatch | Failure], ImagePool | None]:
        """A running iterator of the DataLoader; takes note of the processes that it starts."""
        if self._kept is not None:
            loader, pool = self._kept
            pool.reclaim()  # an iteration that was left early keeps none; the workers finish it before they go on
        else:
            loader, pool = self._data_loader()
        if self._persistent:
            self._kept = loader, pool
        before = set(multiprocessing.active_children())
        iterator = iter(loader)
        self._workers |= set(multiprocessing.active_children()) - before
        return iterator, pool

    def _data_loader(self) -> tuple[DataLoader, ImagePool | None]:
        options, workers, pool = self._options, self._num_workers, None
        if workers:
            largest = self._batches.largest
            per_worker = options.prefetch + 1 + -(-self._held_batches // workers)
            pool = ImagePool(workers, per_worker, (largest, *self._image_shape))
        loader = DataLoader(
            _BatchMaker(self._dataset, self._planner, self._image_shape, pool, self._worker_positions),
            batch_size=None,  # the workers make whole batches
            sampler=SlotSampler(self._batches, pool),
            collate_fn=_unchanged,
            num_workers=workers,
            prefetch_factor=options.prefetch if workers else None,
            persistent_workers=self._persistent,
            pin_memory=options.pin_memory and torch.cuda.is_available(),
            timeout=options.timeout_seconds if workers else 0,
            multiprocessing_context="fork" if workers else None,  # not forkserver: docs/scale.md, "Loader processes"
            worker_init_fn=_start_worker if workers else None,
            generator=torch.Generator().manual_seed(0),  # else starting a loader would move the global generator
        )
        return loader, pool

    def _watched(self, iterator: Iterator[Batch]) -> Iterator[Batch]:
        """Batches made in this process, which is ended when one takes too long: nothing else can end a hung read."""
        while True:
            watchdog = threading.Timer(self._options.timeout_seconds, self._give_up)
            watchdog.daemon = True
            watchdog.start()
            try:
                batch = next(iterator, None)
            finally:
                watchdog.cancel()
            if batch is None:
                return
            yield batch

    def _give_up(self) -> None:
        several = os.environ.get("WORLD_SIZE", "1") != "1"
        where = f"rank {os.environ.get('RANK')} on {host_name()}: " if several else ""
        print(f"error: {where}{self._explain('timed out')}", file=sys.stderr, flush=True)
        os._exit(EXIT_REQUEUE)

    def _explain(self, found: str) -> str:
        at_work = self._worker_positions.active(self._dataset.reader.corpora)
        if "timed out" in found:
            places = ", ".join(sorted({place for _, place in at_work}))
            return (
                f"no batch within {self._options.timeout_seconds:g} s, while reading {places or 'nothing'}: the "
                "storage hangs or is too slow; check it, or raise data.timeout_seconds"
            )
        died = {int(number) for number in re.findall(r"\d+", found)}  # torch: "(pid 7)", "(pid(s) 7, 8)"
        places = [f", at {place}" for pid, place in at_work if pid in died]
        return (
            f"a loader process died ({found.rstrip('. ')}){''.join(places)}: most often out of memory; lower "
            "data.num_workers or data.prefetch; if it dies at the same sample again, prepare the data without it"
        )


def build_train_loader(
    corpora: Sequence[Corpus],
    order: SampleOrder,
    preparation: Preparation,
    *,
    micro_batch: int,
    accumulation: int,
    rank: int,
    world: int,
    start_step: int,
    num_steps: int,
    seed: int,
    options: LoaderOptions,
    skipped: Collection[int] = (),
    num_texts: int = 1,
) -> BatchLoader:
    """Micro-batches of ``rank`` for steps ``start_step`` .. ``num_steps``-1, ``accumulation`` per step, in order;
    the ``skipped`` steps are left out.

    Whatever the topology, step s holds the samples at positions [s*G, (s+1)*G) of ``order``, G the global batch.
    With ``num_texts`` above 1 a sample is an image with up to so many of its texts, and ``order`` counts images.
    """
    reader = _reader(corpora, preparation, options, options.augmentation, head_tail)
    batches = TrainBatches(start_step, num_steps, rank, world, micro_batch, accumulation, frozenset(skipped))
    rows = None if num_texts == 1 else [corpus.first_rows() for corpus in corpora]
    dataset = TrainDataset(reader, order, seed, num_texts, rows)
    return BatchLoader(dataset, batches, preparation.planner, options, accumulation)


def build_eval_loader(
    corpora: Sequence[Corpus],
    preparation: Preparation,
    *,
    batch_size: int,
    rank: int,
    world: int,
    seed: int,
    options: LoaderOptions,
    max_samples: int | None = None,
    images: EvalImages = "own",
    texts_per_image: int | None = None,
) -> BatchLoader:
    """Every chosen sample exactly once over all ranks; batch k belongs to rank k mod world, the last may be smaller.

    Ranks may get different numbers of batches, also none: see ``BatchLoader.most_batches``.
    """
    reader = _reader(corpora, preparation, options)
    dataset = EvalDataset(reader, seed, max_samples, images, texts_per_image)
    starts = range(0, len(dataset), batch_size)
    batches = EvalBatches(tuple(range(start, min(start + batch_size, len(dataset))) for start in starts), rank, world)
    return BatchLoader(dataset, batches, preparation.planner, options, persistent=True)


def _reader(
    corpora: Sequence[Corpus],
    preparation: Preparation,
    options: LoaderOptions,
    augmentation: str = "none",
    choose: FrameChoice = uniform,
) -> SampleReader:
    shrinks = options.fast_decode and augmentation == "none"  # augmentations are defined on the full resolution
    pictures = Pictures(
        transform=clip_transform(preparation.image_size, options.fast_decode),
        max_pixels=options.max_pixels,
        draft_size=draft_size(preparation.image_size, shrinks),
        augment=augment_named(augmentation, preparation.image_size),
        num_frames=options.frames,
        choose=choose,
    )
    return SampleReader(
        corpora=corpora,
        maker=preparation.maker,
        pictures=pictures,
        features=None if preparation.features is None else preparation.features.open(corpora),
    )


class _BatchMaker:
    """What a loader process runs: the positions of a batch to the batch."""

    def __init__(
        self,
        dataset: TrainDataset | EvalDataset,
        planner: Planner,
        image_shape: tuple[int, ...],
        pool: ImagePool | None,
        worker_positions: WorkerPositions,
    ) -> None:
        self._dataset, self._planner, self._image_shape, self._pool = dataset, planner, image_shape, pool
        self._worker_positions = worker_positions

    def __getitem__(self, task: tuple[int | None, Sequence[int]]) -> Batch | SharedBatch | Failure:
        slot, positions = task
        if slot is None:
            images = torch.empty((len(positions), *self._image_shape), dtype=torch.uint8)
        else:
            images = self._pool.images(slot, len(positions))
        worker = get_worker_info()
        try:
            with self._worker_positions.track(0 if worker is None else worker.id) as started:
                items = self._dataset.items(positions, images, started)
        except DataError as error:
            return Failure(str(error), EXIT_MEND if isinstance(error, OutOfDescriptors) else EXIT_REQUEUE)
        batch = collate(items, images, self._planner, positions)
        batch.stored = self._dataset.reader.stored
        assert batch.images.data_ptr() == images.data_ptr(), "the planner must keep the images where they are"
        return batch if self._pool is None else SharedBatch(batch, slot, self._pool)


def _start_worker(_: int) -> None:
    """Signals of a loader process: the rank decides about stopping, and takes its workers with it when it dies.

    Schedulers send SIGTERM to whole process groups; torch makes workers die of it, and the rank with them, before it
    can save. A killed rank must not leave workers waiting on a full queue: Linux kills them with it.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _unchanged(batch: Batch | SharedBatch | Failure) -> Batch | SharedBatch | Failure:
    return batch


def _kill(workers: set[multiprocessing.process.BaseProcess]) -> None:
    """Ends workers that may hang, which would keep the program from ending; torch need not hear of their deaths."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if in_main_thread else None
    for worker in workers:
        worker.kill()
    deadline = time.monotonic() + _KILL_SECONDS
    for worker in workers:
        worker.join(timeout=max(deadline - time.monotonic(), 0))  # one that hangs inside the kernel dies when it can
    if in_main_thread:
        signal.signal(signal.SIGCHLD, handler)
