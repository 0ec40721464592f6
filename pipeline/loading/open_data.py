"""Opens the data that a configuration names: corpora, tokenizer, sample order and loaders."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from data_prep.manifest import CAPTIONS, ManifestError, find_manifests, is_split
from data_prep.video.decoding import require_decoder
from model.batch import Batch
from pipeline.config.options import Config, ConfigError, reads_by_language_model, weighted_paths
from pipeline.data.order import ORDER_VERSION, SampleOrder
from pipeline.data.shard_reader import Corpus, refuse_twice
from pipeline.data.tokenizer import TextTokenizer, tokenizer_of
from pipeline.data.transforms import TRANSFORM_VERSION
from pipeline.distributed.host_cores import usable_cores
from pipeline.distributed.places import Place
from pipeline.distributed.ranks import Agreement
from pipeline.loading.datasets import EvalImages, Preparation
from pipeline.loading.loader import BatchLoader, LoaderOptions, build_eval_loader, build_train_loader
from pipeline.loading.shared_opening import Split, check_in_shares, found_by_main
from pipeline.pictures.augmentation import describe
from pipeline.pictures.frame_choice import FRAME_CHOICE_VERSION

MAX_EVAL_WORKERS = 2
FIRST_IMAGES = 32


@dataclass
class TrainingData:
    """Training corpora with their shares (None: by size), held-out corpora and the tokenizer."""

    corpora: list[Corpus]
    weights: list[float] | None
    held_out: list[Corpus]
    tokenizer: TextTokenizer
    texts_per_image: int = 1

    @property
    def sizes(self) -> list[int]:
        """Samples of each training corpus: its texts, or its images where several texts of one are a sample."""
        return [len(one) if self.texts_per_image == 1 else one.manifest.samples for one in self.corpora]


def open_training_data(
    config: Config, num_images: int = 1, agreement: Agreement | None = None, texts: str = CAPTIONS
) -> TrainingData:
    """Open everything once, corpora of ``num_images`` a sample, or with ``data.frames`` of clips, with all ranks of
    ``agreement`` (None: alone).

    In a folder of corpora those are taken whose ``texts`` are these (``Manifest.texts``).

    Every rank must call it. Raises ValueError, on every rank the same, in one line for what does not fit.
    """
    agreement = agreement or Agreement()
    tokenizer = tokenizer_of(config)
    weighted = weighted_paths(config.data)
    by_path, held_out = found_by_main(lambda: _find_splits(config, num_images, texts), agreement)
    splits = [split for found in by_path for split in found]
    check_in_shares([*splits, *held_out], agreement)
    corpora, weights = [Corpus(*split) for split in splits], []
    for found, (_, weight) in zip(by_path, weighted):
        rows = [manifest.rows for _, manifest in found]
        weights += [(1.0 if weight is None else weight) * own / sum(rows) for own in rows]
    explicit = any(weight is not None for _, weight in weighted)
    held_out = [Corpus(*split) for split in held_out]
    data = TrainingData(corpora, weights if explicit else None, held_out, tokenizer, config.data.texts_per_image)
    samples = sum(data.sizes)
    if samples < config.optim.batch_size:
        raise ConfigError(
            f"the training data has {samples} samples, fewer than one batch of optim.batch_size "
            f"{config.optim.batch_size}; use a smaller batch or prepare more data"
        )
    return data


def open_held_out(
    config: Config, num_images: int = 1, agreement: Agreement | None = None, texts: str = CAPTIONS
) -> list[Corpus]:
    """The corpora of ``data.eval_split``; paths without that split are passed over, half-written ones refused.

    Opened with all ranks of ``agreement`` (None: alone); every rank must call it.
    """
    agreement = agreement or Agreement()
    found = found_by_main(lambda: _find_held_out(config, num_images, texts), agreement)
    check_in_shares(found, agreement)
    return [Corpus(*split) for split in found]


def _find_splits(config: Config, num_images: int, texts: str) -> tuple[list[list[Split]], list[Split]]:
    """The training splits of each path, and those held out; raises ValueError, also where clips can't be decoded."""
    paths, split = weighted_paths(config.data), config.data.train_split
    videos = config.data.frames is not None
    by_path = [find_manifests(path, split, num_images, texts, videos) for path, _ in paths]
    refuse_twice([folder for found in by_path for folder, _ in found])
    return by_path, _find_held_out(config, num_images, texts)


def _find_held_out(config: Config, num_images: int, texts: str) -> list[Split]:
    split = config.data.eval_split
    _check_frames(config)
    if split is None:
        return []
    found: list[Split] = []
    for path, _ in weighted_paths(config.data):
        try:
            found += find_manifests(path, split, num_images, texts, config.data.frames is not None)
        except ManifestError:
            if (path / split).exists() or not is_split(path) and any(path.glob(f"*/{split}")):
                raise
    return found


def _check_frames(config: Config) -> None:
    """Raise ValueError where clips can't be decoded, or no network here reads them."""
    if config.data.frames is None:
        return
    if not reads_by_language_model(config):
        raise ConfigError(
            f"data.frames {config.data.frames}: objective.name {config.objective.name} reads no clips; use"
            " --objective.name evlgen, or --data.frames null for images"
        )
    require_decoder()


def sample_order(config: Config, data: TrainingData) -> SampleOrder:
    """The order in which a run sees its samples."""
    settings, sizes = config.data, data.sizes
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
    found = {
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
            "augmentation": describe(settings.augmentation),
        },
    }
    if settings.frames is not None:
        found["frames"] = {"version": FRAME_CHOICE_VERSION, "number": settings.frames}
    if settings.features is not None:
        found["features"] = settings.features
    return found if data.texts_per_image == 1 else found | {"texts_per_image": data.texts_per_image}


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
            num_texts=self._data.texts_per_image,
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


def first_images(config: Config, data: TrainingData, preparation: Preparation, count: int = FIRST_IMAGES) -> Tensor:
    """The images of the first usable samples of training, of ``count``: uint8 [B, I, 3, S, S], or their features."""
    loader = build_train_loader(
        data.corpora,
        sample_order(config, data),
        preparation,
        micro_batch=min(count, sum(data.sizes)),
        accumulation=1,
        rank=0,
        world=1,
        start_step=0,
        num_steps=1,
        seed=config.train.seed,
        options=replace(loader_options(config, False), num_workers=0),
        num_texts=data.texts_per_image,
    )
    batch = next(iter(loader)).to("cpu")
    loader.close()
    unusable = {key for key, _ in batch.problems}
    usable = [number for number, key in enumerate(batch.keys) if key not in unusable]
    return batch.images[usable] if usable else batch.images


def eval_loader(
    config: Config,
    corpora: list[Corpus],
    preparation: Preparation,
    place: Place,
    pin: bool,
    images: EvalImages = "own",
    texts_per_image: int | None = None,
) -> BatchLoader:
    """Each held-out text (or image, with up to ``texts_per_image``) once over all ranks; ``images``: whose."""
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
        images=images,
        texts_per_image=texts_per_image,
    )


def placeholder_batch(preparation: Preparation, num_images: int = 1) -> Batch:
    """A batch without targets, for a rank that has run dry while others still compute together."""
    size, features = preparation.image_size, preparation.features
    shape = (3, size, size) if features is None else features.bytes_shape
    images = torch.zeros((1, num_images, *shape), dtype=torch.uint8)
    batch = preparation.planner(images, preparation.maker.placeholder(""))
    batch.stored = None if features is None else features.torch_dtype
    return batch


def loader_options(config: Config, pin: bool) -> LoaderOptions:
    data = config.data
    return LoaderOptions(
        num_workers=min(data.num_workers, usable_cores()),  # changes no batch; more than cores only contend
        prefetch=data.prefetch,
        pin_memory=pin,
        timeout_seconds=data.timeout_seconds,
        max_pixels=data.max_pixels,
        fast_decode=data.fast_decode,
        augmentation=data.augmentation,
        frames=data.frames,
    )
