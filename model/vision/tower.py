"""What a vision tower is to the rest of the house, and which one `model.vision.name` means."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor, nn

from model.config import VisionConfig
from model.vision.clip import VisionTower, resolve_sizes
from model.vision.external import ExternalTower, external_tower

MAX_LEADING = 16  # class, distillation and register tokens; more before the patches has no tower of timm and open_clip


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
    if config.stage is not None and not (config.name or "").startswith("timm/"):
        raise ValueError(
            f"model.vision.stage {config.stage} is of timm/NAME only, found model.vision.name {config.name}; use null"
        )
    if config.name is not None and "/" in config.name:
        if config.temporal is not None:
            raise ValueError(
                f"model.vision.temporal {config.temporal}: the blocks of {config.name} are another library's; use a ViT"
                " of open_clip's names, eva-vit-g, or model.vision.temporal null"
            )
        return external_tower(config)
    return VisionTower(resolve_sizes(config))


def tokens_of(tower: nn.Module, images: Tensor, num_frames: int = 1) -> Tensor:
    """The tokens [B*I, P, W] of images uint8 [B, I, 3, S, S]; of features [B, I, P, W] these, and no tower is run."""
    if images.ndim == 4:
        return images.flatten(0, 1)
    if num_frames == 1:
        return tower(images.flatten(0, 1))
    return tower(images.flatten(0, 1), num_frames)


class Grid(NamedTuple):
    """Where the tokens of a tower stand in the image: ``height`` x ``width`` cells, row by row, after ``leading`` ones
    that stand nowhere (class, registers)."""

    height: int
    width: int
    leading: int


def grid_of(tower: Tower) -> Grid | None:
    """The grid of a tower's tokens, None where it is not known.

    Of a foreign tower that gives tokens (and no map) it is what its patches say, a convolution whose stride is its
    size: one token each, behind the few that are no patch, as open_clip, timm and transformers all order them. A tower
    that merges patches, as Swin does, or has many other tokens, as YOLOS does, has no known grid.
    """
    if isinstance(tower, VisionTower):
        return Grid(tower.grid, tower.grid, 1)
    if not isinstance(tower, ExternalTower):
        return None
    if tower.map_size is not None:
        return Grid(*tower.map_size, 0)
    convolution = next((one for one in tower.backbone.modules() if isinstance(one, nn.Conv2d)), None)
    if convolution is None or convolution.stride != convolution.kernel_size:
        return None
    height, width = (tower.image_size // stride for stride in convolution.stride)
    leading = tower.num_tokens - height * width
    return Grid(height, width, leading) if 0 <= leading <= MAX_LEADING else None
