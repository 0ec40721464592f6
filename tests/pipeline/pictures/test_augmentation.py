"""RandAugment and crop_flip: operations against their definition on pixels, draws that depend on the seed alone."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from pipeline.pictures import augmentation
from pipeline.pictures.augmentation import (
    CROP_AREA,
    CROP_RATIO,
    OPERATIONS,
    _part,
    augment_named,
    crop_flip,
    randaugment,
)

HEIGHT, WIDTH = 61, 87


@pytest.fixture(scope="module")
def image() -> Image.Image:
    """Noise over a gradient, with a channel that does not fill its range."""
    generator = np.random.default_rng(0)
    ramp = np.linspace(20, 200, WIDTH)[None, :, None] + np.linspace(-15, 35, HEIGHT)[:, None, None]
    pixels = ramp + generator.normal(0, 20, (HEIGHT, WIDTH, 3))
    return Image.fromarray(pixels.clip([0, 30, 10], [255, 180, 240]).astype(np.uint8))


def moved(pixels: np.ndarray, source) -> np.ndarray:
    """The output whose pixel with its centre at (x, y) is that of the input that holds ``source(x, y)``, else black."""
    result = np.zeros_like(pixels)
    for y in range(HEIGHT):
        for x in range(WIDTH):
            column, row = (int(np.floor(value)) for value in source(x + 0.5, y + 0.5))
            if 0 <= column < WIDTH and 0 <= row < HEIGHT:
                result[y, x] = pixels[row, column]
    return result


def turned(x: float, y: float) -> tuple[float, float]:
    """Where a pixel comes from when the image turns counter-clockwise by 9 degrees about its centre (y points down)."""
    angle, dx, dy = np.radians(9), x - WIDTH / 2, y - HEIGHT / 2
    return (
        WIDTH / 2 + np.cos(angle) * dx - np.sin(angle) * dy,
        HEIGHT / 2 + np.sin(angle) * dx + np.cos(angle) * dy,
    )


def blend(start: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """.64 of the image and .36 of its degenerate form."""
    return start + 0.64 * (pixels.astype(np.float64) - start)


def grey(pixels: np.ndarray) -> np.ndarray:
    """Luma of ITU-R 601 (.299, .587, .114), in 65536ths as Pillow has them."""
    return (pixels.astype(np.int64) @ np.array([19595, 38470, 7471]) + 32768 >> 16).astype(np.float64)


def smoothed(pixels: np.ndarray) -> np.ndarray:
    """Weights 1 1 1, 1 5 1, 1 1 1 over 13; the border stays."""
    result = pixels.astype(np.float64)
    inside = sum(
        (5 if dy == dx == 1 else 1) * pixels[dy : HEIGHT - 2 + dy, dx : WIDTH - 2 + dx].astype(np.float64)
        for dy in range(3)
        for dx in range(3)
    )
    result[1:-1, 1:-1] = np.floor(inside / 13 + 0.5)
    return result


def stretched(pixels: np.ndarray) -> np.ndarray:
    low, high = pixels.min((0, 1)), pixels.max((0, 1))
    return (pixels - low.astype(np.float64)) * 255 / (high - low.astype(np.float64))


def equalized(pixels: np.ndarray) -> np.ndarray:
    """Each level becomes the number of smaller values (and half a step), in steps of 1/255 of all but the largest."""
    result = np.empty_like(pixels)
    for channel in range(3):
        counts = np.bincount(pixels[..., channel].ravel(), minlength=256)
        step = (counts.sum() - counts[counts > 0][-1]) // 255
        below = np.concatenate([[0], np.cumsum(counts)[:-1]])
        result[..., channel] = ((step // 2 + below) // step).clip(0, 255)[pixels[..., channel]]
    return result


def solarized(pixels: np.ndarray, threshold: float) -> np.ndarray:
    return np.where(pixels < threshold, pixels, 255 - pixels)


DEFINITIONS = {  # (pixels, sign) -> pixels
    "autocontrast": lambda p, s: stretched(p),
    "equalize": lambda p, s: equalized(p),
    "rotate": lambda p, s: moved(p, turned),
    "posterize": lambda p, s: p & 0x80,
    "solarize": lambda p, s: solarized(p, 76.8),
    "solarize_add": lambda p, s: solarized(np.minimum(p.astype(int) + 33, 255), 128),
    "color": lambda p, s: blend(grey(p)[..., None], p),
    "contrast": lambda p, s: blend(np.floor(grey(p).mean() + 0.5), p),
    "brightness": lambda p, s: blend(np.zeros(1), p),
    "sharpness": lambda p, s: blend(smoothed(p), p),
    "shear_x": lambda p, s: moved(p, lambda x, y: (x + s * 0.09 * y, y)),
    "shear_y": lambda p, s: moved(p, lambda x, y: (x, y + s * 0.09 * x)),
    "translate_x": lambda p, s: moved(p, lambda x, y: (x + s * 30, y)),
    "translate_y": lambda p, s: moved(p, lambda x, y: (x, y + s * 30)),
}


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_operation_is_its_definition(operation, image: Image.Image) -> None:
    """Values of a blend or a stretch are cut to integers, so they may lie a level apart; all others are equal, but
    for pixels that a turn takes from the edge between two: Pillow computes with 16 binary digits."""
    name = operation.__name__
    tolerance = 1 if name in ("autocontrast", "color", "contrast", "brightness", "sharpness") else 0
    at_an_edge = 2 if name == "rotate" else 0
    for sign in (1, -1):
        changed = operation(image, sign)
        assert changed.mode == "RGB" and changed.size == image.size
        found, wanted = np.asarray(changed).astype(float), DEFINITIONS[name](np.asarray(image), sign)
        assert (np.abs(found - wanted).max(axis=2) > tolerance).sum() <= at_an_edge
        assert np.abs(found - np.asarray(image)).mean() > 1


def test_fourteen_operations_are_drawn_alike_with_both_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, int]] = []

    def record(name: str):
        return lambda image, sign: drawn.append((name, sign)) or image

    monkeypatch.setattr(augmentation, "OPERATIONS", tuple(record(operation.__name__) for operation in OPERATIONS))
    for seed in range(7000):
        randaugment(None, seed)
    counts = Counter(drawn)
    assert len(drawn) == 14000 and len(counts) == 28
    assert all(400 < count < 600 for count in counts.values()), counts  # 500 expected, 4.5 standard deviations
    pairs = {(one, other) for (one, _), (other, _) in zip(drawn[::2], drawn[1::2])}
    assert len(pairs) == 14 * 14, "the two are drawn independently, and with replacement"


def test_the_seed_alone_decides(image: Image.Image) -> None:
    states = random.getstate(), np.random.get_state()[1].tolist()
    first = [np.asarray(randaugment(image, seed)) for seed in range(30)]
    random.random()
    np.random.random()
    second = [np.asarray(randaugment(image, seed)) for seed in reversed(range(30))]
    assert all((a == b).all() for a, b in zip(first, reversed(second)))
    assert len({a.tobytes() for a in first}) > 25
    random.setstate(states[0])
    before = random.getstate(), np.random.get_state()[1].tolist()
    randaugment(image, 1)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before, "no global generator is used"


def test_tiny_and_flat_images() -> None:
    for size in ((1, 1), (1, 40), (300, 2)):
        for operation in OPERATIONS:
            assert operation(Image.new("RGB", size, (7, 7, 7)), 1).size == size


def test_a_part_of_the_image_is_cut_out_and_mirrored_or_not(image: Image.Image) -> None:
    """What comes out is a resize of a box of the image, for some box as large and as wide as allowed."""
    mirrored = 0
    for seed in range(40):
        generator = np.random.Generator(np.random.Philox(key=augmentation.mix_words(seed, "crop_flip")))
        flips = bool(generator.integers(2))
        left, top, right, bottom = _part(image.size, generator)
        assert 0 <= left < right <= WIDTH and 0 <= top < bottom <= HEIGHT
        across, down = right - left, bottom - top
        room = 1 / across + 1 / down  # sides are whole pixels
        assert CROP_AREA[0] * (1 - room) <= across * down / (WIDTH * HEIGHT) <= CROP_AREA[1]
        assert CROP_RATIO[0] * (1 - room) <= across / down <= CROP_RATIO[1] * (1 + room)
        expected = image.crop((left, top, right, bottom)).resize((32, 32), Image.Resampling.BICUBIC)
        expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flips else expected
        found = crop_flip(image, seed, 32)
        assert np.abs(np.asarray(found).astype(int) - np.asarray(expected)).max() <= 24, "taps at the edge of the box"
        assert np.abs(np.asarray(found).astype(int) - np.asarray(expected))[4:-4, 4:-4].max() <= 1
        assert augment_named("crop_flip", 32)(image, seed).tobytes() == found.tobytes()
        mirrored += flips
    assert 10 < mirrored < 30


def test_a_long_image_is_cut_in_its_middle() -> None:
    """Where no drawn part fits, the largest of 4:3 or 3:4."""
    generator = np.random.Generator(np.random.Philox(key=1))
    assert _part((900, 30), generator) == (430, 0, 470, 30)
    assert _part((30, 900), generator) == (0, 430, 30, 470)
