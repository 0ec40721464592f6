"""Random changes of a training image, drawn from the seed of its sample: RandAugment, or a crop and a flip.

RandAugment is that of Cubuk et al. (2020, arXiv:1909.13719); operations and values are those of ``clip_randaug`` in the
fine-tuning of the FLM release: 2 of 14 operations, drawn with replacement, each at magnitude 9 of 30. Crop and flip are
those of EVLGen's release.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from pipeline.data.order import mix_words

AUGMENTATION_VERSION = 1  # part of a run's fingerprint: raise it with any change that moves a pixel
NUM_OPERATIONS = 2
CROP_AREA, CROP_RATIO, CROP_TRIES = (0.5, 1.0), (3 / 4, 4 / 3), 10
MAGNITUDE = 9 / 30  # as a share of the range of an operation's value

Augment = Callable[[Image.Image, int], Image.Image]


def augment_named(name: str, image_size: int) -> Augment | None:
    """What ``data.augmentation`` names: a function of an image in mode RGB and a seed, or None for "none".

    ``image_size`` is that of the model, to which crop_flip stretches what it cuts out.
    """
    return {"none": None, "randaugment": randaugment, "crop_flip": partial(crop_flip, image_size=image_size)}[name]


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


def crop_flip(image: Image.Image, seed: int, image_size: int) -> Image.Image:
    """A part of an image in mode RGB, stretched to ``image_size`` squared, every second one mirrored; equal for equal
    seeds on images of equal size, so that all frames of a clip are cut alike.

    The part has half of the area at least, and sides as 3:4 to 4:3, both drawn; where it does not fit in ten tries it
    is the largest in the middle. Szegedy et al. (2015), with a scale of 0.5 to 1.
    """
    generator = np.random.Generator(np.random.Philox(key=mix_words(seed, "crop_flip")))
    mirrored = bool(generator.integers(2))
    part = image.resize((image_size, image_size), Image.Resampling.BICUBIC, box=_part(image.size, generator))
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else part


def _part(size: tuple[int, int], generator: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the part that ``crop_flip`` cuts out."""
    width, height = size
    for _ in range(CROP_TRIES):
        area = width * height * generator.uniform(*CROP_AREA)
        ratio = math.exp(generator.uniform(*map(math.log, CROP_RATIO)))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            left, top = (int(generator.integers(room + 1)) for room in (width - across, height - down))
            return left, top, left + across, top + down
    low, high = CROP_RATIO
    across, down = min(width, max(1, round(height * high))), min(height, max(1, round(width / low)))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down


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
