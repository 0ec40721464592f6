"""Opens the data that a configuration names: corpora, tokenizer, sample order and loaders."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from data_prep.manifest import ManifestError, find_splits
from model.batch import Batch
from pipeline.config.options import Config, ConfigError, tokenizer_source, weighted_paths
from pipeline.data.order import ORDER_VERSION, SampleOrder
from pipeline.data.shard_reader import Corpus, open_corpora
from pipeline.data.tokenizer import TextTokenizer, load_tokenizer
from pipeline.data.transforms import TRANSFORM_VERSION
from pipeline.distributed.places import Place
from pipeline.loading.datasets import Preparation
from pipeline.loading.loader import BatchLoader, LoaderOptions, build_eval_loader, build_train_loader

MAX_EVAL_WORKERS = 2


@dataclass
class TrainingData:
    """Training corpora with their shares (None: by size), held-out corpora and the tokenizer."""

    corpora: list[Corpus]
    weights: list[float] | None
    held_out: list[Corpus]
    tokenizer: TextTokenizer


def open_training_data(config: Config, num_images: int = 1) -> TrainingData:
    """Open everything once, corpora of ``num_images`` a sample; raises ValueError in one line for what does not fit."""
    tokenizer = load_tokenizer(tokenizer_source(config.data))
    corpora: list[Corpus] = []
    weights: list[float] = []
    weighted = weighted_paths(config.data)
    for path, weight in weighted:
        found = open_corpora([path], config.data.train_split, num_images)
        total = sum(len(corpus) for corpus in found)
        corpora += found
        weights += [(1.0 if weight is None else weight) * len(corpus) / total for corpus in found]
    folders = [corpus.split_dir.resolve() for corpus in corpora]
    if len(set(folders)) < len(folders):
        twice = next(folder for folder in folders if folders.count(folder) > 1)
        raise ConfigError(f"data.paths names {twice} twice; name it once with a weight (DIR:WEIGHT)")
    samples = sum(len(corpus) for corpus in corpora)
    if samples < config.optim.batch_size:
        raise ConfigError(
            f"the training data has {samples} samples, fewer than one batch of optim.batch_size "
            f"{config.optim.batch_size}; use a smaller batch or prepare more data"
        )
    explicit = any(weight is not None for _, weight in weighted)
    return TrainingData(corpora, weights if explicit else None, open_held_out(config, num_images), tokenizer)


def open_held_out(config: Config, num_images: int = 1) -> list[Corpus]:
    """The corpora of ``data.eval_split``; paths without that split are passed over, half-written ones refused."""
    split = config.data.eval_split
    if split is None:
        return []
    found: list[Corpus] = []
    for path, _ in weighted_paths(config.data):
        try:
            find_splits(path, split, num_images)
        except ManifestError:
            if (path / split).exists() or any(path.glob(f"*/{split}")):
                raise
            continue
        found += open_corpora([path], split, num_images)
    return found


def sample_order(config: Config, data: TrainingData) -> SampleOrder:
    """The order in which a run sees its samples."""
    settings, sizes = config.data, [len(corpus) for corpus in data.corpora]
    return SampleOrder(
        sizes,
        config.train.seed,
        data.weights,
        settings.shuffle,
        block_rows=settings.shuffle_block,
        window_blocks=settings.shuffle_window,
    )


def data_fingerprint(config: Config, data: TrainingData) -> dict[str, Any]:
    """What of the data, its order and its preparation decides what a step computes."""
    settings, shuffle = config.data, config.data.shuffle
    if shuffle == "blocks":
        shuffle = f"blocks of {settings.shuffle_block} rows, {settings.shuffle_window} to a window"
    return {
        "corpora": {
            f"{number} {corpus.name}/{corpus.manifest.split}": {
                "rows": len(corpus),
                "shards": len(corpus.manifest.shards),
                "content": corpus.fingerprint,
            }
            for number, corpus in enumerate(data.corpora)
        },
        "weights": data.weights,
        "order": {"version": ORDER_VERSION, "seed": config.train.seed, "shuffle": shuffle},
        "tokenizer": data.tokenizer.fingerprint,
        "max_text_length": settings.max_text_length,
        "images": {
            "version": TRANSFORM_VERSION,
            "size": config.model.vision.image_size,
            "fast_decode": settings.fast_decode,
            "max_pixels": settings.max_pixels,
        },
    }


class TrainingBatches:
    """This rank's micro-batches of a run, from any step on; the steps that the run skips are not read."""

    def __init__(
        self, config: Config, data: TrainingData, preparation: Preparation, place: Place, accumulation: int, pin: bool
    ) -> None:
        self._config, self._data, self._preparation, self._place = config, data, preparation, place
        self._accumulation, self._pin = accumulation, pin
        self._loader: BatchLoader | None = None

    def start(self, step: int, skipped: Collection[int] = ()) -> Iterator[Batch]:
        """Micro-batches from step ``step`` to the last, ``accumulation`` per step, none for the ``skipped`` steps."""
        self.close()
        config = self._config
        self._loader = build_train_loader(
            self._data.corpora,
            sample_order(config, self._data),
            self._preparation,
            micro_batch=config.optim.micro_batch_size,
            accumulation=self._accumulation,
            rank=self._place.rank,
            world=self._place.world_size,
            start_step=step,
            num_steps=config.train.steps,
            seed=config.train.seed,
            options=loader_options(config, self._pin),
            skipped=skipped,
        )
        return iter(self._loader)

    def close(self) -> None:
        """End the loader's processes, also in the middle of a batch."""
        if self._loader is not None:
            self._loader.close()
            self._loader = None

    def failure(self, error: BaseException) -> Exception | None:
        """What went wrong in loading, if ``error`` comes from there."""
        return None if self._loader is None else self._loader.failure(error)


def eval_loader(
    config: Config,
    corpora: list[Corpus],
    preparation: Preparation,
    place: Place,
    pin: bool,
    shuffle_images: bool = False,
) -> BatchLoader:
    """Each held-out sample once over all ranks, with its own image or with another sample's."""
    options = loader_options(config, pin)
    return build_eval_loader(
        corpora,
        preparation,
        batch_size=config.optim.micro_batch_size,
        rank=place.rank,
        world=place.world_size,
        seed=config.train.seed,
        options=replace(options, num_workers=min(options.num_workers, MAX_EVAL_WORKERS)),
        max_samples=config.train.eval_samples,
        shuffle_images=shuffle_images,
    )


def placeholder_batch(preparation: Preparation, num_images: int = 1) -> Batch:
    """A batch without targets, for a rank that has run dry while others still compute together."""
    size = preparation.image_size
    images = torch.zeros((1, num_images, 3, size, size), dtype=torch.uint8)
    return preparation.planner(images, preparation.maker.placeholder(""))


def loader_options(config: Config, pin: bool) -> LoaderOptions:
    data = config.data
    return LoaderOptions(
        num_workers=min(data.num_workers, os.cpu_count() or 1),  # changes no batch; more than cores only contend
        prefetch=data.prefetch,
        pin_memory=pin,
        timeout_seconds=data.timeout_seconds,
        max_pixels=data.max_pixels,
        fast_decode=data.fast_decode,
    )
