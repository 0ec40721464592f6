"""Runs a frozen tower over the images of a split and writes what it gives, a shard at a time."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from model.frozen import freeze
from model.vision.tower import build_tower, tokens_of
from pipeline.config.options import Config, weighted_paths
from pipeline.data.shard_reader import Corpus, open_corpora
from pipeline.data.transforms import UnusableSample, clip_transform, decode_image, draft_size
from pipeline.distributed.host_cores import usable_cores
from pipeline.stored_features.files import Identity, ShardWriter, refuse_stores, seal
from pipeline.stored_features.opening import FeatureSource, check_options, identity_of, tower_hash
from pipeline.weights.sources import load_vision_tower


@dataclass(frozen=True)
class ShardOfImages:
    """A shard whose features are missing: its number in the corpus, the first row of each of its samples."""

    corpus: Corpus
    number: int
    rows: np.ndarray
    identity: Identity

    @property
    def folder(self) -> Path:
        return self.corpus.split_dir / self.identity.folder

    @property
    def samples(self) -> int:
        return len(self.rows)

    @property
    def writer(self) -> ShardWriter:
        return ShardWriter(self.folder, self.number, self.samples, self.identity)


def open_tower(config: Config, device: torch.device) -> tuple[nn.Module, FeatureSource]:
    """The frozen tower of ``config`` with its weights, and what its features are.

    On a GPU it computes in half precision, as a training does there (``train.precision``).

    Raises:
        ValueError: options that features can't follow, or weights that can't be had.
    """
    check_options(config)
    tower = build_tower(config.model.vision)
    load_vision_tower(tower, config.model)
    freeze(tower, config.model.weights or config.model.vision.pretrained)
    source = FeatureSource(identity_of(config, tower, tower_hash(tower)))
    half = {"auto": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16}.get(config.train.precision)
    return tower.to(device, half if device.type == "cuda" and half else torch.float32), source


def unwritten(config: Config, splits: Sequence[str], source: FeatureSource) -> list[ShardOfImages]:
    """The shards of all corpora and ``splits`` whose features are not there yet; says what is there already.

    Raises:
        ValueError: no such split.
    """
    found = []
    paths = [path for path, _ in weighted_paths(config.data)]
    for split in splits:
        for corpus in open_corpora(paths, split, getattr(config.task, "num_images", 1)):
            refuse_stores(corpus)
            identity, first_rows = source.of(corpus), corpus.first_rows()
            ends = np.cumsum(corpus.manifest.shards.samples)
            shards = [
                ShardOfImages(corpus, number, rows, identity)
                for number, rows in enumerate(np.split(first_rows, ends[:-1]))
            ]
            missing = [one for one in shards if not one.writer.is_done]
            size = len(first_rows) * int(np.prod(identity.shape)) * identity.torch_dtype.itemsize
            where = corpus.split_dir / identity.folder
            print(
                f"{where}: {len(shards) - len(missing)} of {len(shards)} shards, {size / 2**30:.2f} GiB in all",
                flush=True,
            )
            if not missing:
                seal(where, len(shards), identity)
            found += missing
    return found


@torch.inference_mode()
def write_shard(shard: ShardOfImages, config: Config, tower: nn.Module, device: torch.device, batch_size: int) -> None:
    """Write the features of one shard, and the summary where it was the last one."""
    size, fast = config.model.vision.image_size, config.data.fast_decode
    read = partial(_pixels, shard.corpus, clip_transform(size, fast), config.data.max_pixels, draft_size(size, fast))
    features = torch.zeros((shard.samples, *shard.identity.shape), dtype=shard.identity.torch_dtype)
    unusable: dict[int, tuple[str, str]] = {}
    with ThreadPoolExecutor(usable_cores()) as pool:
        for start in range(0, shard.samples, batch_size):
            found = list(pool.map(read, shard.rows[start : start + batch_size].tolist()))
            usable = [number for number, one in enumerate(found) if isinstance(one, Tensor)]
            unusable |= {start + n: (e.key, e.reason) for n, e in enumerate(found) if isinstance(e, UnusableSample)}
            if usable:
                images = torch.stack([found[number] for number in usable]).to(device)
                tokens = tokens_of(tower, images).unflatten(0, images.shape[:2])
                features[torch.tensor(usable) + start] = tokens.to(features.dtype).cpu()
    shard.folder.mkdir(exist_ok=True)
    shard.writer.write(features, unusable)
    seal(shard.folder, len(shard.corpus.manifest.shards), shard.identity)


def _pixels(corpus: Corpus, transform, max_pixels: int, draft: int | None, row: int) -> Tensor | UnusableSample:
    """The images of a row, uint8 [I, 3, S, S], or why there are none."""
    try:
        sample = corpus.read(row)
        return torch.stack([transform(decode_image(one, max_pixels, sample.key, draft)) for one in sample.images])
    except UnusableSample as error:
        return error
