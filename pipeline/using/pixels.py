"""What a caller gives as images, PIL images, arrays, bytes or paths, as the pixels that training would see."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_prep.images import ImageProblem, check_size, image_problems, upright_rgb
from pipeline.data.transforms import unusable
from pipeline.pictures.pictures import Pictures
from pipeline.tasks.captioning import pixels_of_bytes, read_bounded

EXPECTED = "a PIL image, a uint8 array [H, W, 3], a path or the bytes of a file"


def samples_of(images: Any, num_images: int, of_clips: bool) -> tuple[list[Any], bool]:
    """What a caller gave as a list of samples, and whether it was a single one.

    A sample is an image; a clip where the model is one of clips; or ``num_images`` images, where they are judged
    together. A list holds samples, and so does an array with a dimension more than an image, or clip, has.
    """
    if isinstance(images, np.ndarray | Tensor):
        images = np.asarray(images)
        if images.ndim == 4 + of_clips:
            images = list(images)
    if not isinstance(images, list | tuple):
        return [images], True
    if num_images > 1 and not any(isinstance(one, list | tuple) for one in images) and len(images):
        return [images], True
    return list(images), False


def pixels_of(sample: Any, num_images: int, pictures: Pictures, name: str) -> Tensor:
    """uint8 [I, 3, S, S] of a sample; ``name`` is what a message calls it.

    Raises:
        ValueError: it is no image, or none that can be used; one line that says why.
    """
    if num_images == 1:
        return _pixels(sample, pictures, name)
    if not isinstance(sample, list | tuple) or len(sample) != num_images:
        found = f"{len(sample)} of them" if isinstance(sample, list | tuple) else type(sample).__name__
        raise ValueError(f"{name}: expected a list of the {num_images} images that are judged together, found {found}")
    return torch.cat([_pixels(one, pictures, f"{name}, its image {number}") for number, one in enumerate(sample)])


def _pixels(image: Any, pictures: Pictures, name: str) -> Tensor:
    """uint8 [1, 3, S, S], or the chosen frames [F, 3, S, S] of a clip."""
    if isinstance(image, str | os.PathLike):
        name = os.fsencode(image).decode("utf-8", "backslashreplace")
        try:
            image = read_bounded(Path(image), name)
        except IsADirectoryError:
            raise ValueError(f"{name}: a folder; name the image files in it") from None
        except OSError as error:
            raise ValueError(f"{name}: {error.strerror or error}; give the path of a readable image file") from None
    if isinstance(image, bytes | bytearray | memoryview):
        return pixels_of_bytes(bytes(image), name, pictures)
    if pictures.num_frames is not None:
        return _frames(image, pictures, name)
    return pictures.transform(_upright(image, pictures, name))[None]


def _frames(clip: Any, pictures: Pictures, name: str) -> Tensor:
    """The chosen frames of a clip that is an array uint8 [F, H, W, 3]."""
    if not hasattr(clip, "__array__") or np.ndim(clip) != 4 or not len(clip):
        raise ValueError(
            f"{name}: this model is one of clips, found {_described(clip)}; expected the path or bytes of a video"
            " file, or its frames as a uint8 array [F, H, W, 3]"
        )
    chosen = pictures.choose(len(clip), pictures.num_frames, 0)
    return torch.stack([pictures.transform(_upright(np.asarray(clip[number]), pictures, name)) for number in chosen])


def _upright(image: Any, pictures: Pictures, name: str) -> Image.Image:
    """A PIL image or an array as decoding gives a file's: mode RGB, upright, what is transparent on white."""
    if not isinstance(image, Image.Image):
        image = _of_array(image, name)
    try:
        with image_problems():
            check_size(*image.size, pictures.max_pixels)
            return upright_rgb(image.copy())
    except ImageProblem as error:
        raise unusable(name, error) from error


def _of_array(image: Any, name: str) -> Image.Image:
    pixels = np.asarray(image) if hasattr(image, "__array__") else np.empty(0)
    grey_or_colour = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))
    if pixels.dtype != np.uint8 or not grey_or_colour or not pixels.size:
        hint = "; numbers from 0 to 1 become uint8 by (255 * image).round().astype('uint8')"
        is_float = hasattr(image, "__array__") and pixels.dtype.kind == "f"
        raise ValueError(f"{name}: found {_described(image)}, expected {EXPECTED}{hint if is_float else ''}")
    return Image.fromarray(np.ascontiguousarray(pixels))


def _described(image: Any) -> str:
    if not hasattr(image, "__array__"):
        return f"a {type(image).__name__}"
    found = np.asarray(image)
    return f"an array of {found.dtype} {list(found.shape)}"


def batched(items: Sequence[Any], batch_size: int) -> list[Sequence[Any]]:
    """The items in runs of at most ``batch_size``; raises ValueError for less than one."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected 1 or more")
    return [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
