"""A small split of images with one to five captions each, which name the image's colour and number, for tests."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.record import Record
from data_prep.shard_writer import SplitWriter

COLOURS = ("red", "green", "blue", "grey", "pink", "brown")
PLACES = ("on the table", "near a window", "in the garden", "under an old tree", "on a chair")


def png(number: int) -> bytes:
    """32 px of noise."""
    pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def captions(number: int) -> tuple[str, ...]:
    colour = COLOURS[number % len(COLOURS)]
    return tuple(f"a {colour} box number {number} {PLACES[place]}" for place in range(1 + number % len(PLACES)))


def write_gallery(split_dir: Path, num_images: int, broken: tuple[int, ...] = (), twice: int | None = None) -> Path:
    """``broken`` images can't be decoded; the last image has the id of image ``twice``."""
    with SplitWriter(split_dir, split_dir.parent.name, split_dir.name, 1, 5) as writer:
        for number in range(num_images):
            image_id = twice if twice is not None and number == num_images - 1 else number
            image = b"no image" if number in broken else png(number)
            writer.add(Record(f"k{number:03d}", (image,), captions(number), {"image_id": 1000 + image_id}, ("png",)))
    return split_dir
