"""Drawn photographs for tests: clouds of light that no two seeds share, their copies, and splits of them."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from data_prep.record import Record
from data_prep.shard_writer import SplitWriter


def photo(seed, width=320, height=240):
    """An image with structure at all scales, as photographs have it: noise of amplitude 1 / frequency, in colour."""
    numbers = np.random.default_rng(seed)
    levels = np.zeros((height, width, 3))
    for size in (3, 6, 12, 24, 48):
        noise = numbers.normal(size=(size, size, 3)) + 1.5 * numbers.normal(size=(size, size, 1))
        for colour in range(3):
            plane = Image.fromarray(noise[..., colour].astype(np.float32))
            levels[..., colour] += np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC)) * 60 / size**0.7
    return Image.fromarray(np.clip(levels + 128, 0, 255).astype(np.uint8))


def jpeg(image, quality=90):
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def png(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def cropped(image, left=0.0, top=0.0, right=0.0, bottom=0.0):
    """The image without these shares of its width and height."""
    width, height = image.size
    box = (round(left * width), round(top * height), round(width - right * width), round(height - bottom * height))
    return image.crop(box)


def write_split(folder, images, samples_per_shard=3, captions=None, texts="captions", **options):
    """A split CORPUS/SPLIT of encoded images by key, or of tuples of them; two captions each unless given."""
    first = next(iter(images.values()))
    num_images = len(first) if isinstance(first, tuple) else 1
    writer = SplitWriter(folder, folder.parent.name, folder.name, num_images, samples_per_shard, texts=texts, **options)
    with writer:
        for key, content in images.items():
            content = content if isinstance(content, tuple) else (content,)
            extensions = tuple("png" if one.startswith(b"\x89PNG") else "jpg" for one in content)
            said = captions[key] if captions else (f"about {key}", f"more about {key}")
            writer.add(Record(key, content, said, {"image_identities": [f"x/{key}"]}, extensions))
    return folder
