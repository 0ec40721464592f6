"""Images in every form become the pixels that the loader makes of the same file."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.shard_reader import RawSample
from pipeline.pictures.pictures import Pictures, pictures_of
from pipeline.using.model import Model
from pipeline.using.pixels import pixels_of, samples_of

NOISE = np.random.Generator(np.random.Philox(3)).integers(0, 256, (40, 56, 4), dtype=np.uint8)


def file_of(kind: str) -> bytes:
    """An encoded image of a kind that needs more than decoding."""
    image, options = Image.fromarray(NOISE[..., :3]), {"format": "PNG"}
    if kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        options = {"format": "JPEG", "exif": exif, "quality": 90}
    elif kind == "palette":
        image = image.quantize(16)
        options["transparency"] = 3
    elif kind == "alpha":
        image = Image.fromarray(NOISE, "RGBA")
    elif kind == "grey":
        image = image.convert("L")
    elif kind == "grey with alpha":
        image = Image.fromarray(NOISE[..., :2].copy(), "LA")
    elif kind == "16 bits":
        image = Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257)
    elif kind == "cmyk":
        image, options = image.convert("CMYK"), {"format": "JPEG"}
    elif kind == "animation":
        options = {"format": "GIF", "save_all": True, "append_images": [image.rotate(90)]}
    elif kind == "large":  # more than four times the model's size, where a fast decoder would shrink
        image, options = image.resize((400, 300)), {"format": "JPEG"}
    stream = io.BytesIO()
    image.save(stream, **options)
    return stream.getvalue()


KINDS = ("plain", "turned", "palette", "alpha", "grey", "grey with alpha", "16 bits", "cmyk", "animation", "large")


@pytest.fixture
def pictures(model_of: Callable[[str], Model]) -> Pictures:
    """Those of training; data.fast_decode is false in these runs."""
    return pictures_of(model_of("flm")._trained.run.config)


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_of_a_file_gives_the_pixels_of_training(
    model_of: Callable[[str], Model], pictures: Pictures, tmp_path: Path, kind: str
) -> None:
    """Bit for bit."""
    data, path = file_of(kind), tmp_path / "file"
    path.write_bytes(data)
    expected = pictures.of(RawSample("", [data], "", {})).numpy()
    model = model_of("flm")
    opened = Image.open(path)
    for form in (data, path, str(path), opened, opened):  # a picture is as it was, and may be given again
        assert np.array_equal(model.pixels(form), expected)
    assert expected.shape == (1, 3, 32, 32) and expected.std() > 10


def test_arrays_are_images_that_are_upright_already(model_of: Callable[[str], Model]) -> None:
    model = model_of("flm")
    for array in (NOISE[..., :3], NOISE, NOISE[..., 0], NOISE[:, ::-1, :3]):
        assert np.array_equal(model.pixels(array), model.pixels(Image.fromarray(np.ascontiguousarray(array))))
    assert np.array_equal(model.pixels(torch.from_numpy(NOISE)), model.pixels(NOISE))
    stack = np.stack([NOISE[..., :3], NOISE[::-1, :, :3]])
    assert model.caption(stack) == model.caption(list(stack))


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (NOISE[..., :3] / 255, r"image: found an array of float64 \[40, 56, 3\], expected a PIL image.*255 \* image"),
        (NOISE[..., :2], r"image: found an array of uint8 \[40, 56, 2\], expected"),
        (np.zeros((0, 4, 3), np.uint8), "expected a PIL image"),
        (None, "image: found a NoneType, expected a PIL image, a uint8 array"),
        ("no/such.jpg", "no/such.jpg: No such file or directory; give the path of a readable image file"),
        (".", "^.: a folder; name the image files in it"),
        (b"no image", "image: not an image"),
        (b"", "image: empty image"),
        (np.zeros((1, 300, 3), np.uint8), "image: extreme aspect ratio"),
        (Image.fromarray(np.zeros((4, 4), np.float32)), "image: unsupported pixel format"),
    ],
)
def test_what_is_no_usable_image_is_one_line(model_of: Callable[[str], Model], image: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        model_of("flm").pixels(image)
    assert "\n" not in str(error.value)


def test_a_bad_image_of_many_is_named(model_of: Callable[[str], Model]) -> None:
    good = file_of("plain")
    for use in (model_of("flm").caption, model_of("flm").index, model_of("flm").features):
        with pytest.raises(ValueError, match=r"images\[3\]: not an image"):
            use([good, good, good, b"no image"], batch_size=2)


def test_images_that_are_judged_together_are_a_list(pictures: Pictures) -> None:
    one = Image.fromarray(NOISE[..., :3])
    assert samples_of([one, one], 2, False) == ([[one, one]], True)
    assert samples_of([[one, one]], 2, False) == ([[one, one]], False)
    assert pixels_of([one, one], 2, pictures, "images[0]").shape == (2, 3, 32, 32)
    with pytest.raises(ValueError, match=r"images\[0\]: expected a list of the 2 images .* found 3 of them"):
        pixels_of([one, one, one], 2, pictures, "images[0]")
    with pytest.raises(ValueError, match="found Image"):
        pixels_of(one, 2, pictures, "images[0]")
