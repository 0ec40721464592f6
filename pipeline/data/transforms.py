"""Decodes stored images and resizes them to a uint8 tensor of the model's resolution."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from data_prep.images import TRAINING_FORMATS, ImageProblem, image_problems, open_image, upright_rgb

TRANSFORM_VERSION = 2  # part of a run's fingerprint: raise it with any change that moves a pixel
# What version 2 changed, if a run of version 1 goes on: transparency was dropped, orientation in XMP was not applied.
DEFAULT_MAX_PIXELS = 100_000_000
_WORDS = {"undecodable_image": "broken image", "aspect_ratio": "extreme aspect ratio"}  # else those of data_prep
_WORDS |= {"undecodable_video": "broken video"}


class UnusableSample(ValueError):
    """A sample that cannot be used: its ``key``, and a ``reason`` from a small fixed set, fit for counting."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}")
        self.key, self.reason = key, reason

    def __reduce__(self):
        return type(self), (self.key, self.reason)


def decode_image(
    data: bytes, max_pixels: int = DEFAULT_MAX_PIXELS, key: str = "", draft_size: int | None = None
) -> Image.Image:
    """The image in mode RGB, as preparing decodes it (``data_prep.images``).

    Captions describe the upright picture, with its logo visible (NOTE release: ignores the EXIF orientation, and drops
    alpha after the resize, so that what is black on transparent becomes black on black). ``draft_size`` lets the JPEG
    decoder shrink images whose shorter side stays at least that long. Raises UnusableSample with one of the reasons
    "empty image", "not an image", "too many pixels", "too many scans", "too many parts", "extreme aspect ratio",
    "truncated image", "broken image", "unsupported pixel format".
    """
    try:
        with image_problems():
            image = open_image(data, max_pixels, TRAINING_FORMATS)
            if draft_size is not None:
                image.draft("RGB", (draft_size, draft_size))
            return upright_rgb(image)
    except ImageProblem as error:
        raise unusable(key, error) from error


def unusable(key: str, error: ImageProblem) -> UnusableSample:
    """What the problem of an image or a clip is called in training."""
    return UnusableSample(key, _WORDS.get(error.reason, error.reason.replace("_", " ")))


@dataclass(frozen=True)
class ClipTransform:
    """Shorter side to ``size`` (bicubic), centre crop; uint8 [3, size, size], normalised later on the device.

    Specification 6.2, bit for bit what Pillow gives; of landscape images only what survives the crop is resized, where
    that is the same. With ``fast`` opaque images are resized by PyTorch's vectorised kernel: the same filter with
    coarser weights, about a grey level apart in few pixels, at a third of the time.
    """

    size: int
    fast: bool = False

    def __call__(self, image: Image.Image, out: Tensor | None = None) -> Tensor:
        """``image`` in mode RGB or RGBA, written into ``out`` if given; alpha takes part in the resize only."""
        out = torch.empty((3, self.size, self.size), dtype=torch.uint8) if out is None else out
        if self.fast and image.mode == "RGB":
            return out.copy_(self._vectorised(image))
        resized = self._landscape(image) if image.width > image.height and image.mode == "RGB" else self._whole(image)
        planes = out.numpy()
        for number, band in enumerate("RGB"):  # plane by plane is faster than interleaved and then transposed
            planes[number] = np.frombuffer(resized.tobytes("raw", band), np.uint8).reshape(self.size, self.size)
        return out

    def _vectorised(self, image: Image.Image) -> Tensor:
        width, height = self._resized_shape(image)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        resized = interpolate(pixels, (height, width), mode="bicubic", antialias=True)[0]
        left, top = self._corner(width, height)
        return resized[:, top : top + self.size, left : left + self.size]

    def _whole(self, image: Image.Image) -> Image.Image:
        shape = self._resized_shape(image)
        left, top = self._corner(*shape)
        resized = image.resize(shape, Image.Resampling.BICUBIC)
        if resized.size == (self.size, self.size):
            return resized
        return resized.crop((left, top, left + self.size, top + self.size))

    def _landscape(self, image: Image.Image) -> Image.Image:
        """Equal to one resize and a crop: Pillow resizes landscapes across, rounds to 8 bits, then resizes down."""
        (width, height), (scaled, _) = image.size, self._resized_shape(image)
        left, _ = self._corner(scaled, self.size)
        edges = [column * width / scaled for column in (left, left + self.size)]
        if all(
            float(np.float32(edge)) * scaled == column * width for edge, column in zip(edges, (left, left + self.size))
        ):
            # Pillow takes boxes as float32; these edges are exact in it, as they are for 4:3 and 3:2
            return image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=(edges[0], 0, edges[1], height))
        columns = image.resize((scaled, height), Image.Resampling.BICUBIC).crop((left, 0, left + self.size, height))
        return columns.resize((self.size, self.size), Image.Resampling.BICUBIC)

    def _resized_shape(self, image: Image.Image) -> tuple[int, int]:
        width, height = image.size
        if width <= height:
            return self.size, self.size * height // width
        return self.size * width // height, self.size

    def _corner(self, width: int, height: int) -> tuple[int, int]:
        return round((width - self.size) / 2), round((height - self.size) / 2)


def clip_transform(size: int, fast: bool = False) -> ClipTransform:
    """The transform of CLIP, used by FLM pretraining: no augmentation."""
    return ClipTransform(size, fast)


def draft_size(image_size: int, fast_decode: bool) -> int | None:
    """``decode_image``'s draft size: with ``fast_decode`` at least twice the model's resolution, else none.

    Images of less than four times the resolution decode exactly either way; above, the decoder averages blocks of
    pixels, which differs from the exact resize by little and saves most of the decoding time.
    """
    return 2 * image_size if fast_decode else None
