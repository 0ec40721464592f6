"""Decoding of whatever arrives, and the CLIP transform against references that share no code with it."""

from __future__ import annotations

import io
import pickle
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pipeline.data.transforms import ClipTransform, UnusableSample, clip_transform, decode_image, draft_size
from tests.oracle import load_oracle

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
EXPECTED_RAMP = [[14, 28, 44], [93, 107, 123], [172, 186, 202]]


def encoded(image: Image.Image, fmt: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, fmt, **options)
    return stream.getvalue()


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(decode_image(data))


def keys_kernel(x: float) -> float:
    """Bicubic kernel of Keys (1981) with a = -0.5."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def resize_axis(values: np.ndarray, out_size: int) -> np.ndarray:
    """Antialiased bicubic resize of axis 0 in float64, rounded to 8 bits as after each of Pillow's passes."""
    in_size = values.shape[0]
    scale = in_size / out_size
    stretch = max(scale, 1.0)
    matrix = np.zeros((out_size, in_size))
    for row in range(out_size):
        centre = (row + 0.5) * scale
        low, high = max(int(centre - 2 * stretch + 0.5), 0), min(int(centre + 2 * stretch + 0.5), in_size)
        for column in range(low, high):
            matrix[row, column] = keys_kernel((column + 0.5 - centre) / stretch)
        matrix[row] /= matrix[row].sum()
    return np.clip(np.floor(np.tensordot(matrix, values, 1) + 0.5), 0, 255)


@pytest.mark.parametrize("height, width, size", [(30, 47, 16), (47, 30, 16), (20, 20, 33), (12, 40, 12), (9, 11, 24)])
def test_transform_matches_a_bicubic_resize_written_from_the_formula(height, width, size):
    image = noise(height, width)
    out = clip_transform(size)(Image.fromarray(image))
    new_height = size if height <= width else int(size * height / width)
    new_width = size if width <= height else int(size * width / height)
    wide = resize_axis(image.transpose(1, 0, 2).astype(float), new_width)
    resized = resize_axis(wide.transpose(1, 0, 2), new_height)
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    expected = resized[top : top + size, left : left + size].transpose(2, 0, 1)
    assert out.shape == (3, size, size) and out.dtype == torch.uint8
    assert np.abs(out.numpy().astype(int) - expected).max() <= 1


@settings(max_examples=60, deadline=None)
@given(st.integers(5, 90), st.integers(5, 90), st.sampled_from([8, 16, 32, 48]), st.sampled_from([3, 4]))
def test_transform_is_bit_equal_to_one_resize_and_a_crop(height, width, size, channels):
    image = Image.fromarray(noise(height, width, channels, seed=height * 100 + width))
    new_height = size if height <= width else int(size * height / width)
    new_width = size if width <= height else int(size * width / height)
    left, top = round((new_width - size) / 2), round((new_height - size) / 2)
    whole = image.resize((new_width, new_height), Image.Resampling.BICUBIC)
    expected = np.asarray(whole.crop((left, top, left + size, top + size)).convert("RGB"))
    assert np.array_equal(clip_transform(size)(image).permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("size", [64, 96])
def test_transform_reproduces_the_release(size):
    dump = load_oracle("f_image_transform.pt")
    image = Image.fromarray(dump["rgba"].numpy())  # decoded by hand: decode_image sets it on white
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    ours = (clip_transform(size)(image) / 255 - mean) / std
    assert (ours - dump[f"clip_{size}"]).abs().max() < 1e-5


@pytest.mark.parametrize("size", [16, 24, 72, 288])
@pytest.mark.parametrize("width, height", [(100, 75), (160, 120), (120, 80), (96, 54), (101, 75), (88, 80), (300, 10)])
def test_common_landscapes_are_bit_equal_too(width, height, size):
    """4:3 and 3:2 take another way than the odd ones: both give what one resize and a crop give."""
    image = Image.fromarray(noise(height, width, seed=width))
    scaled = int(size * width / height)
    left = round((scaled - size) / 2)
    whole = image.resize((scaled, size), Image.Resampling.BICUBIC)
    expected = np.asarray(whole.crop((left, 0, left + size, size)))
    assert np.array_equal(clip_transform(size)(image).permute(1, 2, 0).numpy(), expected)


def test_transform_committed_expectation():
    """Guards against a change of Pillow's resampling: CLIP transform of a 6x4 ramp at 3 pixels."""
    ramp = (np.arange(24, dtype=np.uint8) * 10).reshape(4, 6)
    out = ClipTransform(3)(Image.fromarray(np.repeat(ramp[:, :, None], 3, axis=2)))
    assert out[0].tolist() == EXPECTED_RAMP and torch.equal(out[0], out[2])


def test_formats_and_modes_become_rgb():
    grey = noise(20, 30, 1)[:, :, 0]
    assert np.array_equal(pixels(encoded(Image.fromarray(grey), "PNG")), np.repeat(grey[:, :, None], 3, axis=2))
    palette = Image.fromarray(noise(20, 30)).convert("P")
    assert np.array_equal(pixels(encoded(palette, "PNG")), np.asarray(palette.convert("RGB")))
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # full magenta and yellow: red
    red = pixels(encoded(cmyk, "JPEG", quality=95))[8, 8].astype(int)
    assert red[0] > 200 and red[1] < 60 and red[2] < 60
    deep = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    assert np.array_equal(pixels(encoded(Image.fromarray(deep), "PNG"))[:, :, 0], np.arange(256).reshape(16, 16))
    for fmt in ("WEBP", "BMP", "GIF"):
        assert decode_image(encoded(Image.fromarray(noise(20, 30)), fmt)).mode == "RGB"


def test_transparency_in_the_transform_is_dropped_after_the_resize():
    """As the release does: what is transparent does not bleed into what is not."""
    rgba = np.zeros((8, 8, 4), dtype=np.uint8)
    rgba[:, :4] = (200, 100, 50, 255)
    rgba[:, 4:] = (0, 255, 0, 0)
    out = clip_transform(4)(Image.fromarray(rgba))
    colour = torch.tensor([200, 100, 50]).view(3, 1, 1)
    assert (out[:, :, :2].int() - colour).abs().max() <= 4 and out[1].max() < 130


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (10, 10), colour) for colour in ("red", "blue")]
    for fmt in ("GIF", "WEBP"):
        data = encoded(frames[0], fmt, save_all=True, append_images=frames[1:], duration=50)
        colour = pixels(data)[5, 5].astype(int)
        assert colour[0] > 240 and colour[2] < 15


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_exif_orientation_is_applied(orientation, mode):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(noise(12, 20)).convert(mode)
    data = encoded(image, "PNG", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert np.array_equal(pixels(data), expected)
    assert expected.shape[:2] == ((20, 12) if orientation >= 5 else (12, 20))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" * 10))]
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


JPEG = encoded(Image.fromarray(noise(40, 60)), "JPEG")


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "empty image"),
        (b"<html>404 not found</html>", "not an image"),
        (JPEG[: len(JPEG) // 2], "truncated image"),
        (encoded(Image.fromarray(noise(40, 60)), "PNG")[:900], "truncated image"),
        (png_header(40_000, 40_000), "too many pixels"),
        (png_header(400_000, 400_000), "too many pixels"),
        (png_header(100_000, 10), "extreme aspect ratio"),
        (encoded(Image.fromarray(noise(9, 9)), "TIFF"), "not an image"),
    ],
)
def test_bad_images_are_named_with_a_reason(data, reason):
    """Invariants 7 and 8."""
    with pytest.raises(UnusableSample) as caught:
        decode_image(data, key="k1")
    assert (caught.value.key, caught.value.reason) == ("k1", reason)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.key, again.reason, str(again)) == ("k1", reason, f"k1: {reason}")


def test_pixel_limit_is_inclusive():
    """Invariant 7."""
    data = encoded(Image.fromarray(noise(10, 10)), "PNG")
    assert decode_image(data, max_pixels=100).size == (10, 10)
    with pytest.raises(UnusableSample, match="too many pixels"):
        decode_image(data, max_pixels=99)


def test_damaged_files_never_raise_anything_else():
    """Invariant 7: random damage to every format ends in an image or an UnusableSample."""
    generator = random.Random(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(noise(20, 30))
    sound = [encoded(image, fmt, exif=exif) for fmt in ("JPEG", "PNG", "WEBP")] + [
        encoded(image, "GIF"),
        encoded(image, "BMP"),
    ]
    for _ in range(1500):
        data = bytearray(generator.choice(sound))
        for _ in range(generator.choice([1, 3, 20])):
            data[generator.randrange(min(len(data), generator.choice([60, len(data)])))] = generator.randrange(256)
        try:
            assert decode_image(bytes(data), max_pixels=10**6).mode == "RGB"
        except UnusableSample as error:
            assert error.reason


def test_fast_decode_shrinks_only_large_jpegs():
    smooth = Image.fromarray(noise(9, 16)).resize((1600, 900), Image.Resampling.BICUBIC)
    data = encoded(smooth, "JPEG", quality=95)
    assert decode_image(data).size == (1600, 900)
    fast = decode_image(data, draft_size=draft_size(96, fast_decode=True))
    assert 192 <= min(fast.size) < 900
    exact, quick = (
        clip_transform(96)(decode_image(data, draft_size=size)).float() for size in (None, draft_size(96, True))
    )
    assert (exact - quick).abs().mean() < 1.5
    assert decode_image(data, draft_size=draft_size(288, True)).size == (1600, 900)
    assert draft_size(288, fast_decode=False) is None


@pytest.mark.parametrize("height, width", [(37, 50), (50, 37), (40, 40), (224, 224), (120, 90), (31, 200)])
@pytest.mark.parametrize("size", [32, 96, 288])
def test_fast_transform_is_within_rounding_of_the_exact_one(height, width, size):
    small = noise(max(height // 6, 2), max(width // 6, 2), seed=size)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    exact, fast = clip_transform(size)(image).int(), clip_transform(size, fast=True)(image).int()
    assert (exact - fast).abs().max() <= 2 and (exact - fast).abs().float().mean() < 0.05


def test_fast_transform_leaves_transparency_to_the_exact_one():
    image = Image.fromarray(noise(20, 30, 4))
    assert torch.equal(clip_transform(16, fast=True)(image), clip_transform(16)(image))


@pytest.mark.parametrize("fast", [False, True])
def test_transform_writes_where_it_is_told(fast):
    image, batch = Image.fromarray(noise(20, 30)), torch.zeros((2, 3, 16, 16), dtype=torch.uint8)
    returned = clip_transform(16, fast)(image, batch[1])
    assert returned.is_set_to(batch[1]) and batch[0].sum() == 0
    assert torch.equal(batch[1], clip_transform(16, fast)(image))
