"""RandAugment: random changes of a training image, drawn from the seed of its sample.

The method is that of Cubuk et al. (2020, arXiv:1909.13719); operations and values are those of ``clip_randaug`` in the
fine-tuning of the FLM release: 2 of 14 operations, drawn with replacement, each at magnitude 9 of 30.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from PIL import Image, ImageEnhance, ImageOps

from pipeline.data.order import mix_words

AUGMENTATION_VERSION = 1  # part of a run's fingerprint: raise it with any change that moves a pixel
NUM_OPERATIONS = 2
MAGNITUDE = 9 / 30  # as a share of the range of an operation's value

Augment = Callable[[Image.Image, int], Image.Image]


def augment_named(name: str) -> Augment | None:
    """What ``data.augmentation`` names: a function of an image in mode RGB and a seed, or None for "none"."""
    return {"none": None, "randaugment": randaugment}[name]


def describe(name: str) -> str | None:
    """The augmentation as a run's fingerprint names it; None where images stay as they are."""
    return None if name == "none" else f"{name}, version {AUGMENTATION_VERSION}"


def randaugment(image: Image.Image, seed: int) -> Image.Image:
    """An image in mode RGB of the same size; equal for equal seeds on every machine, whatever was drawn before.

    Meant for images of full resolution: shifts are in pixels. What moves out of the image leaves black behind.
    """
    for number in range(NUM_OPERATIONS):
        draw = mix_words(seed, "randaugment", number)
        operation, sign = OPERATIONS[draw % len(OPERATIONS)], 1 if draw >> 63 else -1
        image = operation(image, sign)
    return image


def _value(low: float, high: float) -> float:
    return low + MAGNITUDE * (high - low)


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    """The pixel at (x, y) is the nearest one to (a x + b y + c, d x + e y + f) of the image."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)


def autocontrast(image: Image.Image, sign: int) -> Image.Image:
    return ImageOps.autocontrast(image)


def equalize(image: Image.Image, sign: int) -> Image.Image:
    return ImageOps.equalize(image)


def rotate(image: Image.Image, sign: int) -> Image.Image:
    """Counter-clockwise by 9 degrees, never clockwise: so the release does."""
    return image.rotate(_value(0, 30))


def posterize(image: Image.Image, sign: int) -> Image.Image:
    """One bit of each channel is kept: magnitude 9 gives 1.2, rounded down (NOTE paper: 4 to 8 bits)."""
    return ImageOps.posterize(image, max(1, math.floor(_value(0, 4))))


def solarize(image: Image.Image, sign: int) -> Image.Image:
    return ImageOps.solarize(image, _value(0, 256))


def solarize_add(image: Image.Image, sign: int) -> Image.Image:
    """33 is added to every value; then what is 128 or more is inverted."""
    added = [min(255, level + math.floor(_value(0, 110))) for level in range(256)]
    return image.point([255 - level if level >= 128 else level for level in added] * 3)


def color(image: Image.Image, sign: int) -> Image.Image:
    return ImageEnhance.Color(image).enhance(_value(0.1, 1.9))


def contrast(image: Image.Image, sign: int) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(_value(0.1, 1.9))


def brightness(image: Image.Image, sign: int) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(_value(0.1, 1.9))


def sharpness(image: Image.Image, sign: int) -> Image.Image:
    return ImageEnhance.Sharpness(image).enhance(_value(0.1, 1.9))


def shear_x(image: Image.Image, sign: int) -> Image.Image:
    return _affine(image, 1, sign * _value(0, 0.3), 0, 0, 1, 0)


def shear_y(image: Image.Image, sign: int) -> Image.Image:
    return _affine(image, 1, 0, 0, sign * _value(0, 0.3), 1, 0)


def translate_x(image: Image.Image, sign: int) -> Image.Image:
    return _affine(image, 1, 0, sign * _value(0, 100), 0, 1, 0)


def translate_y(image: Image.Image, sign: int) -> Image.Image:
    return _affine(image, 1, 0, 0, 0, 1, sign * _value(0, 100))


OPERATIONS = (
    *(autocontrast, equalize, rotate, posterize, solarize, solarize_add, color, contrast, brightness, sharpness),
    *(shear_x, shear_y, translate_x, translate_y),
)
