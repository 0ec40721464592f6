"""Vision towers of other libraries behind the members of one of ours: open_clip, timm and Hugging Face transformers.

Legend: B images, S pixels a side, P tokens, W width, h x w cells of a feature map.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from model.config import VisionConfig
from model.recomputing import run
from model.vision.clip import in_millionths
from model.vision.dry_run import cost, cut_unused
from model.vision.libraries import LIBRARIES, Backbone


class ExternalTower(nn.Module):
    """uint8 pixels -> the tokens of a backbone; a feature map becomes h*w tokens with fixed 2-D positions added.

    Batch normalisation uses its running statistics in training too, as detectors do with their backbones: those of a
    batch would depend on which samples share it, on which rank (invariants 2 and 5). Its scales and shifts are trained.
    """

    recompute = False

    def __init__(self, source: str, backbone: Backbone, image_size: int) -> None:
        """``source`` names the tower in errors, like "model.vision.name timm/resnet18"."""
        super().__init__()
        self.backbone, self._function, self.heads = backbone.module, backbone.function, backbone.heads
        statistics = torch.tensor([backbone.mean, backbone.std], dtype=torch.float64) * 255
        self.register_buffer("statistics", in_millionths(statistics).view(2, 3, 1, 1), persistent=False)
        try:
            one, two = ((count, 3, image_size, image_size) for count in (1, 2))  # norms may refuse to train on one
            self.cut = cut_unused(self.backbone, self._function, two)
            output, self.macs = cost(self.backbone, self._function, one)
        except (RuntimeError, AssertionError, ValueError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{source} can't run on images of {image_size} px ({reason}); choose another model.vision.image_size"
            ) from error
        if len(output) not in (3, 4):
            raise ValueError(f"{source} gives an output of shape {output}, expected tokens [B, P, W] or a map")
        self.width = output[2] if len(output) == 3 else output[1]
        self.num_tokens = output[1] if len(output) == 3 else output[2] * output[3]
        self.map_size = tuple(output[2:]) if len(output) == 4 else None  # h, w
        self.image_size = image_size
        table = grid_positions(*output[2:], self.width) if len(output) == 4 else torch.zeros(0, self.width)
        self.register_buffer("positions", in_millionths(table), persistent=False)
        # convolutions are faster on channels last: an EfficientNet-Lite0 on a CPU 1.7 times
        self._layout = torch.channels_last if len(output) == 4 else torch.contiguous_format
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.register_forward_pre_hook(_statistics_as_input)
                module.register_forward_hook(_statistics_as_kept, always_call=True)  # recomputing ends by an exception
        self.train(self.training)

    def features(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] (or floats already normalised) -> what the backbone gives, [B, P, W] or [B, W, h, w]."""
        pixels = images
        if images.dtype == torch.uint8:
            mean, std = (self.statistics.float() / 1e6).unbind(0)
            pixels = (images.float() - mean) / std
        pixels = pixels.to(next(self.backbone.parameters()).dtype).contiguous(memory_format=self._layout)
        return self._function(self.backbone, pixels)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] (or floats already normalised) -> [B, P, W]; normalisation happens here, on the device."""
        tokens = run(self.features, images, recompute=self.recompute and self.training)
        if tokens.ndim == 4:
            tokens = tokens.flatten(2).transpose(1, 2)
            tokens = tokens + (self.positions.float() / 1e6).to(tokens.dtype)
        return tokens

    def train(self, mode: bool = True) -> ExternalTower:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self


def _statistics_as_input(norm: _BatchNorm, inputs: tuple[Tensor, ...]) -> None:
    """Running statistics stay fp32 where the weights are bf16, and no kernel of PyTorch takes them together."""
    norm.kept = {name: norm._buffers[name] for name in ("running_mean", "running_var")}
    for name, value in norm.kept.items():
        norm._buffers[name] = value if value is None else value.to(inputs[0].dtype)


def _statistics_as_kept(norm: _BatchNorm, *_: object) -> None:
    norm._buffers.update(norm.kept)
    del norm.kept


def external_tower(config: VisionConfig) -> ExternalTower:
    """The tower that ``config.name`` (LIBRARY/NAME) means, with random weights.

    Raises:
        ValueError: no such library or name, or it does not take images of ``config.image_size``.
    """
    library, _, name = config.name.partition("/")
    source = f"model.vision.name {config.name}"
    if library not in LIBRARIES:
        raise ValueError(
            f"{source}: no library {library!r}; expected {', '.join(f'{one}/NAME' for one in LIBRARIES)}, the name of"
            " an open_clip ViT, or null"
        )
    try:
        backbone = LIBRARIES[library](name, config)
    except ValueError as error:
        raise ValueError(f"{source}: {' '.join(str(error).split())}") from error
    return ExternalTower(source, backbone, config.image_size)


def grid_positions(height: int, width: int, channels: int) -> Tensor:
    """Sines and cosines of row and column, fp32 [height*width, channels], row by row (Vaswani et al. 2017, in 2-D).

    A quarter of the channels each: sine of the row, sine of the column, cosine of the row, cosine of the column, at
    frequencies from 1 to 1/10000.
    """
    quarter = math.ceil(channels / 4)
    frequency = 1 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angle = torch.cat([row.reshape(-1, 1) * frequency, column.reshape(-1, 1) * frequency], dim=1)
    return torch.cat([angle.sin(), angle.cos()], dim=1)[:, :channels].float()
