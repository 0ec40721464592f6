"""Which stored features a run reads instead of images, checked against its tower and its data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from model.weights.start import named_tensors
from pipeline.checkpoint.files import weights_hash
from pipeline.config.options import Config, ConfigError
from pipeline.data.shard_reader import Corpus
from pipeline.data.transforms import TRANSFORM_VERSION
from pipeline.distributed.ranks import Agreement
from pipeline.stored_features.files import Identity, StoredFeatures


@dataclass(frozen=True)
class FeatureSource:
    """Features of a run's tower, whatever the corpus: ``identity`` is that of no split."""

    identity: Identity
    _opened: dict[Path, StoredFeatures] = field(default_factory=dict, compare=False)

    @property
    def bytes_shape(self) -> tuple[int, int]:
        """[P, 2W] of one image."""
        return self.identity.bytes_shape[1:]

    @property
    def torch_dtype(self) -> torch.dtype:
        return self.identity.torch_dtype

    def of(self, corpus: Corpus) -> Identity:
        """What the features of a corpus are."""
        return dataclasses.replace(self.identity, split=corpus.fingerprint, images=corpus.num_images)

    def open(self, corpora: Sequence[Corpus]) -> list[StoredFeatures]:
        """The stored features of each corpus, opened once; raises ConfigError where they are missing or others."""
        for corpus in corpora:
            if corpus.split_dir not in self._opened:
                self._opened[corpus.split_dir] = StoredFeatures(corpus, self.of(corpus))
        return [self._opened[corpus.split_dir] for corpus in corpora]


def feature_source(
    config: Config, objective: nn.Module, agreement: Agreement, corpora: Sequence[Corpus]
) -> FeatureSource | None:
    """The features that a run with this ``config`` reads, None where it reads images; every rank must call it.

    The vision tower of ``objective`` has its weights on rank 0.

    Raises:
        ConfigError: options that features of a frozen tower can't follow, or a corpus without its features.
    """
    if config.data.features is None:
        return None
    check_options(config)
    tower = objective.net.vision
    sha256 = agreement.gather(tower_hash(tower) if agreement.is_main else None)[0]
    source = FeatureSource(identity_of(config, tower, sha256))
    source.open(corpora)
    return source


def identity_of(config: Config, tower: nn.Module, sha256: str) -> Identity:
    """Of no split yet; ``sha256`` is the tower's."""
    return Identity(
        split="",
        tower=sha256,
        tokens=tower.num_tokens,
        width=tower.width,
        images=1,
        image_size=config.model.vision.image_size,
        fast_decode=config.data.fast_decode,
        max_pixels=config.data.max_pixels,
        transform_version=TRANSFORM_VERSION,
        dtype=config.data.features,
    )


def tower_hash(tower: nn.Module) -> str:
    """SHA-256 of its weights."""
    return weights_hash(dict(named_tensors(tower)))


def check_options(config: Config) -> None:
    """Raises ConfigError for options that features of a frozen tower can't follow."""
    vision = config.model.vision
    reasons = {
        "model.vision.frozen false: the tower would change": not vision.frozen,
        f"model.vision.temporal {vision.temporal}, which is trained in the tower": vision.temporal is not None,
        f"data.frames {config.data.frames}: a clip has other frames in every epoch": config.data.frames is not None,
        f"data.augmentation {config.data.augmentation}, which changes images in every epoch": config.data.augmentation
        != "none",
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(f"data.features {config.data.features} can't be with {reason}; use --data.features null")
