"""Decodes untrusted image bytes safely and resizes them to a uint8 tensor of the model's resolution."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # what data_prep writes and users caption; rare decoders are a risk
TRANSFORM_VERSION = 1  # part of a run's fingerprint: raise it with any change that moves a pixel
DEFAULT_MAX_PIXELS = 100_000_000
MAX_SCANS = 10  # of a progressive JPEG of max_pixels, more of a smaller one: each scan is decoded on its own
MAX_ASPECT = 100  # longer over shorter side: resizing the shorter one would blow up the longer
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, EOFError, OverflowError)
_DECODE_ERRORS += (struct.error, zlib.error, MemoryError)  # what Pillow raises on damaged data
_TRUNCATION_WORDS = ("truncated", "unexpected end", "not enough image data")
_ORIENTATION_TAG = 0x0112  # of EXIF; its values and what turns each upright
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


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
    """The image as mode RGB, or RGBA where it has transparency (``ClipTransform`` drops alpha after the resize).

    Size and aspect are checked in the header before anything is decoded. Greyscale, palette, CMYK and 16-bit images
    are converted; of an animation the first frame is taken; the EXIF orientation is applied, because captions describe
    the upright picture (NOTE release: ignores it). ``draft_size`` lets the JPEG decoder shrink images whose shorter
    side stays at least that long. Raises UnusableSample with one of the reasons "empty image", "not an image",
    "too many pixels", "too many scans", "extreme aspect ratio", "truncated image", "broken image",
    "unsupported pixel format".
    """
    if not data:
        raise UnusableSample(key, "empty image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # size is checked by max_pixels below, odd metadata is harmless
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            _check_size(image.size, max_pixels, key)
            _check_scans(image, data, max_pixels, key)
            if draft_size is not None:
                image.draft("RGB", (draft_size, draft_size))
            image.load()
            return _upright(_as_rgb(image, key))
    except UnusableSample:
        raise
    except Image.DecompressionBombError:
        raise UnusableSample(key, "too many pixels") from None
    except UnidentifiedImageError:
        raise UnusableSample(key, "not an image") from None
    except _DECODE_ERRORS as error:
        truncated = any(word in str(error).lower() for word in _TRUNCATION_WORDS)
        raise UnusableSample(key, "truncated image" if truncated else "broken image") from error


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


def _check_size(size: tuple[int, int], max_pixels: int, key: str) -> None:
    width, height = size
    if min(size) < 1:
        raise UnusableSample(key, "broken image")
    if width * height > max_pixels:
        raise UnusableSample(key, "too many pixels")
    if max(size) > MAX_ASPECT * min(size):
        raise UnusableSample(key, "extreme aspect ratio")


def _check_scans(image: Image.Image, data: bytes, max_pixels: int, key: str) -> None:
    """Refuse progressive JPEGs with many scans: a few kilobytes of empty scans keep the decoder busy for minutes.

    The bytes 0xFF 0xDA begin a scan and occur nowhere else but in embedded thumbnails.
    """
    if image.format == "JPEG" and data.count(b"\xff\xda") * image.width * image.height > MAX_SCANS * max_pixels:
        raise UnusableSample(key, "too many scans")


def _as_rgb(image: Image.Image, key: str) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit greyscale; Pillow's own conversion would clip it to white
        levels = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        return _keep_exif(image, Image.fromarray(levels.astype(np.uint8)).convert("RGB"))
    if image.mode == "F":
        raise UnusableSample(key, "unsupported pixel format")
    return _keep_exif(image, image.convert("RGBA" if image.has_transparency_data else "RGB"))


def _keep_exif(source: Image.Image, converted: Image.Image) -> Image.Image:
    if "exif" in source.info:
        converted.info["exif"] = source.info["exif"]
    return converted


def _upright(image: Image.Image) -> Image.Image:
    if "exif" not in image.info:
        return image
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except _DECODE_ERRORS:
        return image  # damaged metadata, sound pixels
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image
