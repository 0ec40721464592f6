"""What a vision tower is to the rest of the house, and which one `model.vision.name` means."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from model.config import VisionConfig
from model.vision.clip import VisionTower, resolve_sizes
from model.vision.external import external_tower


class Tower(Protocol):
    """A module from pixels to tokens. Nothing outside of model/vision asks for more than these members."""

    width: int  # channels of a token
    num_tokens: int  # tokens of an image
    recompute: bool  # activation checkpointing: of each block, or of the whole where blocks are not known

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the forward pass of one image."""

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> [B, P, W] in the tower's dtype; normalisation happens here, on the device."""


def build_tower(config: VisionConfig) -> nn.Module:
    """A :class:`Tower` with random weights: the CLIP ViT of this package, or one of another library (LIBRARY/NAME).

    Raises:
        ValueError: no such name, or sizes that do not fit it.
    """
    if config.name is not None and "/" in config.name:
        return external_tower(config)
    return VisionTower(resolve_sizes(config))
