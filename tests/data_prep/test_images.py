"""One guard for preparing and training: the same images, the same pixels, the same refusals, before any decoding."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from data_prep.filters import REASONS, Limits, check_image
from data_prep.images import MAX_SCANS, ImageProblem, image_problems, open_image, upright_rgb
from pipeline.data.transforms import UnusableSample, clip_transform, decode_image

NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
PICTURE = Image.fromarray(NOISE)
XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="{}"/></x:xmpmeta>'


def encoded(image: Image.Image, fmt: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, fmt, **options)
    return stream.getvalue()


JPEG, PNG, GIF, WEBP = (encoded(PICTURE, fmt) for fmt in ("JPEG", "PNG", "GIF", "WEBP"))
GIF_HEADER = 13 + 3 * 256


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def after(content: bytes, position: int, addition: bytes) -> bytes:
    return content[:position] + addition + content[position:]


def with_scans(fmt: str, side: int, scans: int) -> bytes:
    """A progressive JPEG whose last scan stands in it many times; as MPO with a second image behind it."""
    image = Image.new("L", (side, side), 90)
    data = encoded(image, "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    data = data[:-2] + last * scans + data[-2:]
    if fmt == "MPO":
        whole = encoded(image, "MPO", save_all=True, append_images=[image], progressive=True)
        begin = whole.index(b"\xff\xe2")  # the list of images, as its own segment, makes it an MPO
        data = after(data, 2, whole[begin : begin + 2 + int.from_bytes(whole[begin + 2 : begin + 4], "big")])
        assert Image.open(io.BytesIO(data)).format == "MPO"
    return data


def prepared(data: bytes, **limits) -> np.ndarray:
    """What training sees of what preparing stores."""
    return np.asarray(decode_image(check_image(data, Limits(min_side=1, **limits))[0]))


def refused(data: bytes) -> str:
    """The reason, which preparing and training agree about."""
    with pytest.raises(ImageProblem) as preparing:
        check_image(data, Limits())
    with pytest.raises(UnusableSample) as training:
        decode_image(data, Limits().max_pixels)
    words = {"broken image": "undecodable_image", "extreme aspect ratio": "aspect_ratio"}
    reason = preparing.value.reason
    assert words.get(training.value.reason, training.value.reason.replace(" ", "_")) == reason and reason in REASONS
    return reason


@pytest.mark.parametrize(
    ("reason", "data"),
    [
        ("empty_image", b""),
        ("not_an_image", b"<html>gone</html>"),
        ("truncated_image", JPEG[: len(JPEG) // 2]),
        ("truncated_image", JPEG[:300]),  # ends within its tables
        ("truncated_image", PNG[: len(PNG) // 2]),
        ("aspect_ratio", encoded(Image.new("RGB", (4000, 20)), "PNG")),
        ("too_many_pixels", after(WEBP, 12, b"VP8X\n\0\0\0\2\0\0\0\xff\x3f\0\xff\x3f\0")),  # a canvas of 16384 x 16384
        ("too_many_scans", with_scans("JPEG", 100, MAX_SCANS)),
        ("too_many_scans", with_scans("JPEG", 4000, 40)),
        ("too_many_scans", with_scans("MPO", 2000, 1000)),
        ("too_many_parts", after(JPEG, 2, segment(0xE3, b"") * 5000)),
        ("too_many_parts", after(JPEG, 2, segment(0xDB, b"\0" + b"\1" * 64) * 300)),
        ("undecodable_image", after(JPEG, 2, segment(0xDB, (b"\0" + b"\1" * 64) * 1000))),
        ("too_many_parts", after(PNG, 33, chunk(b"teXt", b"") * 5000)),
        ("too_many_parts", after(PNG, 33, chunk(b"IDAT", b"") * 5000)),
        ("too_many_parts", after(GIF, GIF_HEADER, b"!\xfe" + b"\1x" * 5000 + b"\0")),
        ("too_many_parts", WEBP + b"ABCD\0\0\0\0" * 5000),
        ("unsupported_pixel_format", after(encoded(PICTURE, "BMP"), 30, b"\1\0\0\0")),
    ],
)
def test_preparing_and_training_refuse_the_same_for_the_same_reason(reason: str, data: bytes, monkeypatch) -> None:
    """Invariant 7: bombs are refused by counting what is there, before a decoder sees them."""
    if reason.startswith("too_many"):
        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    assert refused(data) == reason


@pytest.mark.parametrize("scans", [0, 5, 40])
@pytest.mark.parametrize("fmt", ["JPEG", "MPO"])
def test_honest_progressive_images_are_kept(fmt: str, scans: int) -> None:
    assert prepared(with_scans(fmt, 100, scans)).shape == (100, 100, 3)


def test_scans_of_further_images_do_not_count() -> None:
    """A burst of 60 photographs in one file: the first is taken."""
    burst = encoded(PICTURE, "MPO", save_all=True, append_images=[PICTURE] * 60)
    assert burst.count(b"\xff\xda") > MAX_SCANS
    assert np.array_equal(prepared(burst), np.asarray(Image.open(io.BytesIO(burst))))


def test_sound_images_with_large_texts_and_profiles_are_kept_with_the_same_pixels() -> None:
    profile = np.random.default_rng(1).integers(0, 256, 1_500_000, dtype=np.uint8).tobytes()
    texts = PngInfo()
    texts.add_text("Comment", "x" * 2_000_000, zip=True)
    texts.add_itxt("Title", "y" * 2_000_000, zip=True)
    large = encoded(PICTURE, "PNG", pnginfo=texts, icc_profile=profile)
    assert check_image(large, Limits()) == (large, "png")
    assert np.array_equal(prepared(large), NOISE)
    jpeg = encoded(PICTURE, "JPEG", icc_profile=profile, comment=b"z" * 60_000)
    assert np.array_equal(prepared(jpeg), np.asarray(Image.open(io.BytesIO(JPEG))))


@pytest.mark.parametrize(
    "data",
    [
        after(JPEG, 2, segment(0xE1, b"Exif\0\0" + bytes(60_000)) * 100),  # Pillow would join them, a copy each
        after(JPEG, 2, segment(0xED, b"Photoshop 3.0\0" + (b"8BIM" + bytes(8)) * 5000) * 100),
        after(JPEG, 2, segment(0xFE, bytes(60_000)) * 100),
        after(JPEG, 2, b"\xff" * 100_000),
        after(PNG, 33, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10_000_000))) * 100),
        after(PNG, 33, chunk(b"eXIf", bytes(100_000)) * 20),
        PNG + bytes(1_000_000),
    ],
)
def test_pillow_is_given_nothing_that_no_pixel_depends_on(data: bytes, monkeypatch) -> None:
    given = []
    opened = Image.open
    monkeypatch.setattr(Image, "open", lambda stream, **options: given.append(stream) or opened(stream, **options))
    expected = NOISE if data.startswith(PNG[:8]) else np.asarray(opened(io.BytesIO(JPEG)))
    assert np.array_equal(decode_image(data), expected)
    assert len(given[0].getvalue()) < 80_000


def logos() -> dict[str, tuple[bytes, np.ndarray]]:
    """A black logo on a transparent ground that is black too, with a soft edge where the format has one."""
    alpha = np.zeros((64, 64), dtype=np.uint8)
    alpha[16:48, 16:48] = 255
    hard, soft = 255 - alpha, alpha.copy()
    soft[16:48, 16:20] = 128
    black = np.zeros((64, 64, 3), dtype=np.uint8)
    grey = (255 * 255 - 255 * soft.astype(int) + 127) // 255  # black over white
    rgba = Image.fromarray(np.dstack([black, soft]))
    keyed = Image.fromarray(np.where(alpha[..., None] == 255, black, np.uint8([9, 8, 7])))
    palette = Image.fromarray((alpha // 255).astype(np.uint8)).convert("P")
    palette.putpalette([0, 0, 0, 0, 0, 0])
    sixteen = Image.fromarray(np.where(alpha == 255, 0, 7).astype(np.uint16))
    return {
        "RGBA": (encoded(rgba, "PNG"), grey),
        "LA": (encoded(rgba.convert("LA"), "PNG"), grey),
        "WebP": (encoded(rgba, "WEBP", lossless=True, exact=True), grey),
        "P+tRNS": (encoded(palette, "PNG", transparency=0), hard),
        "GIF": (encoded(palette, "GIF", transparency=0), hard),
        "RGB+tRNS": (encoded(keyed, "PNG", transparency=(9, 8, 7)), hard),
        "L+tRNS": (encoded(keyed.getchannel(0), "PNG", transparency=9), hard),
        "16 bit+tRNS": (after(encoded(sixteen, "PNG"), 33, chunk(b"tRNS", b"\0\7")), hard),
    }


@pytest.mark.parametrize("name", logos())
def test_a_black_logo_on_a_transparent_ground_is_black_on_white_whichever_way(name: str) -> None:
    data, expected = logos()[name]
    seen = np.asarray(decode_image(data))
    assert np.array_equal(seen[..., 0], seen[..., 1]) and np.abs(seen[..., 0].astype(int) - expected).max() <= 1
    kept, shrunk = prepared(data), prepared(data, image_size=32)
    if name != "GIF":  # which is stored as JPEG
        assert np.array_equal(kept, seen)
    small = [clip_transform(32)(Image.fromarray(pixels)).numpy().astype(int) for pixels in (kept, shrunk)]
    assert np.abs(small[0] - small[1]).mean() < 4  # what JPEG costs


def test_images_without_transparency_keep_every_bit() -> None:
    opaque = PICTURE.copy()
    opaque.putalpha(255)
    for data in (PNG, encoded(opaque, "PNG"), encoded(PICTURE, "BMP"), encoded(opaque, "WEBP", lossless=True)):
        assert np.array_equal(decode_image(data), NOISE)
    for data in (JPEG, GIF, WEBP, encoded(PICTURE.convert("CMYK"), "JPEG"), encoded(PICTURE.convert("1"), "PNG")):
        assert np.array_equal(decode_image(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_in_xmp_alone_is_applied_as_pillow_does(fmt: str, orientation: int) -> None:
    xmp = XMP.format(orientation)
    if fmt == "PNG":
        texts = PngInfo()
        texts.add_itxt("XML:com.adobe.xmp", xmp)
        data = encoded(PICTURE, fmt, pnginfo=texts)
    else:
        data = encoded(PICTURE, fmt, **({"tiffinfo": {700: xmp.encode()}} if fmt == "TIFF" else {"xmp": xmp.encode()}))
    with image_problems():
        found = upright_rgb(open_image(data, 10_000))
    assert found.size == ((40, 60) if orientation >= 5 else (60, 40))
    assert np.array_equal(found, ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
