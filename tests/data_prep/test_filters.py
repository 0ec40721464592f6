"""What is kept and why not: every reason has bytes that cause it."""

import io
import struct
import zlib

import pytest
from PIL import Image

from data_prep.filters import REASONS, DuplicateFilter, Limits, check_image, check_record, safe_key
from data_prep.images import ImageProblem
from data_prep.record import Record


def encode(mode="RGB", image_format="JPEG", size=(40, 30), **options):
    image = Image.radial_gradient("L").resize(size).convert(mode)
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


def png_bomb(width=60000, height=60000):
    """A PNG of a few bytes whose header announces billions of pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def reason(content, **limits):
    with pytest.raises(ImageProblem) as caught:
        check_image(content, Limits(**limits))
    assert caught.value.reason in REASONS
    return caught.value.reason


@pytest.mark.parametrize(
    ("mode", "image_format", "extension"),
    [
        ("RGB", "JPEG", "jpg"),
        ("L", "JPEG", "jpg"),
        ("CMYK", "JPEG", "jpg"),
        ("RGBA", "PNG", "png"),
        ("LA", "PNG", "png"),
        ("P", "PNG", "png"),
        ("1", "PNG", "png"),
        ("RGBA", "WEBP", "webp"),
    ],
)
def test_every_colour_mode_is_usable_and_its_bytes_are_kept(mode, image_format, extension):
    content = encode(mode, image_format)
    assert check_image(content, Limits()) == (content, extension)


@pytest.mark.parametrize("image_format", ["GIF", "BMP", "TIFF"])
def test_other_formats_become_jpeg(image_format):
    content, extension = check_image(encode(image_format=image_format), Limits())
    assert extension == "jpg" and Image.open(io.BytesIO(content)).format == "JPEG"


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG"])
def test_animated_images_give_their_first_frame(image_format):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    stream = io.BytesIO()
    frames[0].save(stream, image_format, save_all=True, append_images=frames[1:], lossless=True)
    content, _ = check_image(stream.getvalue(), Limits())
    red, _, blue = Image.open(io.BytesIO(content)).convert("RGB").getpixel((16, 16))
    assert red > 200 and blue < 60


def test_transparent_parts_become_white_when_reencoded():
    stream = io.BytesIO()
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(stream, "PNG")
    content, extension = check_image(stream.getvalue(), Limits(image_size=32))
    assert extension == "jpg" and min(Image.open(io.BytesIO(content)).getpixel((16, 16))) > 250


def test_shrinking_keeps_the_aspect_and_never_enlarges():
    content, _ = check_image(encode(size=(400, 200)), Limits(image_size=100))
    assert Image.open(io.BytesIO(content)).size == (200, 100)
    small = encode(size=(90, 80))
    assert check_image(small, Limits(image_size=100)) == (small, "jpg")


def test_unusable_images_by_reason():
    """Invariant 8: counted by reason."""
    jpeg, png = encode(size=(200, 200)), encode(image_format="PNG", size=(200, 200))
    assert reason(b"") == "empty_image"
    assert reason(b"<html>404</html>") == "not_an_image"
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") == "not_an_image"
    assert reason(jpeg[: len(jpeg) // 2]) == "truncated_image"
    assert reason(encode(size=(32, 32))[:300]) == "truncated_image"  # ends within its header
    assert reason(png[: len(png) // 2]) == "truncated_image"
    assert reason(png[:60] + b"\0" * 30 + png[90:]) in ("undecodable_image", "truncated_image")
    assert reason(jpeg[:8]) in ("not_an_image", "undecodable_image", "truncated_image")
    assert reason(encode(size=(8, 40))) == "image_too_small"
    assert reason(encode(size=(320, 40)), max_aspect=4.0) == "aspect_ratio"
    assert reason(jpeg, max_image_bytes=100) == "image_bytes_too_large"


def test_bombs_are_refused_by_their_header(monkeypatch):
    """Invariant 7: no unbounded image."""
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda self: pytest.fail("decoded"))
    assert reason(png_bomb()) == "too_many_pixels"
    assert reason(png_bomb(9000, 9000)) == "too_many_pixels"  # below Pillow's own limit, above ours
    assert reason(encode(image_format="PNG", size=(100, 100)), max_pixels=9999) == "too_many_pixels"


def test_flipped_and_cut_bytes_never_raise_anything_else():
    """Invariant 7: nothing fetched is trusted."""
    for image_format in ("JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP"):
        content = encode(image_format=image_format)
        for position in range(0, len(content), max(1, len(content) // 40)):
            flipped = bytearray(content)
            flipped[position] ^= 0xFF
            for damaged in (bytes(flipped), content[:position]):
                try:
                    check_image(damaged, Limits(max_pixels=10**6))
                except ImageProblem as error:
                    assert error.reason in REASONS


def test_captions_are_judged_one_by_one():
    record = Record("k", (encode(),), ("  a dog \n runs ", "", " \t", "caf\udce9", "a\0b", "b"))
    kept, rejections = check_record(record, Limits())
    assert kept.captions == ("a dog runs", "b")
    reasons = [rejection.reason for rejection in rejections]
    assert reasons == ["empty_caption", "empty_caption", "invalid_utf8", "nul_in_caption"]
    assert kept.extensions == ("jpg",)


def test_a_rejected_image_costs_all_its_rows():
    kept, rejections = check_record(Record("k", (b"no image",), ("a", "b", "")), Limits())
    assert kept is None
    assert [(r.reason, r.rows) for r in rejections] == [("empty_caption", 1), ("not_an_image", 2)]
    kept, rejections = check_record(Record("k", (encode(),), ()), Limits())
    assert kept is None and [(r.reason, r.rows) for r in rejections] == [("empty_caption", 1)]


def test_keys_are_safe_member_names():
    """Invariant 7: no path out of the folder."""
    assert safe_key("../../etc/passwd") == "______etc_passwd"
    assert safe_key("1000_a-b") == "1000_a-b"
    assert "." not in safe_key("a.b.c") and safe_key("") != ""
    long_keys = {safe_key("x" * 200 + str(number)) for number in range(5)}
    assert len(long_keys) == 5 and all(len(key) <= 80 for key in long_keys)


def test_duplicates():
    image = encode()
    judge = DuplicateFilter(drop_pairs=True)
    assert judge(Record("a", (image,), ("one", "two")))[1] == []
    kept, rejections = judge(Record("a", (image,), ("three",)))
    assert kept is None and rejections[0].reason == "duplicate_key"
    kept, rejections = judge(Record("b", (image,), ("two", "three")))
    assert kept.captions == ("three",) and [r.reason for r in rejections] == ["duplicate_pair"]
    assert judge(Record("c", (image,), ("one",)))[0] is None
    assert DuplicateFilter(drop_pairs=False)(Record("c", (image,), ("one", "one")))[0].captions == ("one", "one")


def test_what_is_of_a_caption_goes_with_it():
    """A label or an id never moves to another caption, whichever filter drops one before it."""
    captions = ("a dog", " ", "two  dogs", "a\0cat", "a dog", "a hen")
    record = Record("k", (encode(),), captions, {"file": "k.jpg"}, per_caption={"label": list(range(6))})
    kept, rejections = check_record(record, Limits())
    assert (kept.captions, kept.per_caption) == (("a dog", "two dogs", "a dog", "a hen"), {"label": [0, 2, 4, 5]})
    assert [rejection.reason for rejection in rejections] == ["empty_caption", "nul_in_caption"]
    unique, rejections = DuplicateFilter(True)(kept)
    assert (unique.captions, unique.per_caption) == (("a dog", "two dogs", "a hen"), {"label": [0, 2, 5]})
    assert len(rejections) == 1 and unique.meta == record.meta
    with pytest.raises(AssertionError):
        Record("k", (encode(),), ("a", "b"), per_caption={"label": [0]})
