"""Opens untrusted image bytes: one guard for preparing and for training, so that what one keeps the other reads.

What a file holds is counted before a decoder sees it, and what no pixel depends on (texts, colour profiles, thumbnails,
further frames) is not handed on: Pillow would unpack, copy or walk it in Python, and refuse sound images for it.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

# Formats decoded by self-contained code; others (EPS, PDF, ...) may start programs or read further files.
TRAINING_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # what is stored, and what users caption
FORMATS = (*TRAINING_FORMATS, "TIFF")
MAX_ASPECT = 100  # longer over shorter side: resizing the shorter one would blow up the longer
MAX_SCANS = 50  # of a progressive JPEG, each decoded on its own; encoders write about 10
MAX_FULL_SCANS = 10  # of a JPEG of max_pixels; a smaller one may have more
MAX_HEADER_SEGMENTS = 256  # of a JPEG's tables before its first scan
MAX_TABLE_BYTES = 1024  # of one segment of them
MAX_METADATA_BYTES = 1 << 16  # of EXIF or XMP, which are read for the orientation only
_FREE_PARTS, _BYTES_PER_PART = 1024, 128  # a file may have so many parts, and one more for each so many bytes

_DECODE_ERRORS = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError, AttributeError)
_DECODE_ERRORS += (struct.error, zlib.error, MemoryError)  # what Pillow raises on damaged data
_UPRIGHT = {  # value of the orientation in EXIF or XMP -> what turns the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # restarts and stuffed bytes left out
_JPEG_ALONE = {0x01, 0xD8}  # markers without a length
_JPEG_TABLES = {*range(0xC0, 0xD0), 0xDB, 0xDD}  # frame, codes, quantisation, restarts
_PNG_KEPT = {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS"}


class ImageProblem(ValueError):
    """Bytes that cannot be used as an image or clip; ``reason`` is a word of data_prep/filters.py's REASONS."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@contextmanager
def image_problems() -> Iterator[None]:
    """Around everything that touches an image: whatever Pillow raises on bad data becomes an ImageProblem."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # size is checked here, odd metadata is harmless
            yield
    except ImageProblem:
        raise
    except Image.DecompressionBombError as error:
        raise ImageProblem("too_many_pixels", str(error)) from error
    except UnidentifiedImageError as error:
        raise ImageProblem("not_an_image") from error
    except _DECODE_ERRORS as error:
        message = str(error)
        early = isinstance(error, EOFError) or re.search("truncated|end of file|not enough image", message, re.I)
        raise ImageProblem("truncated_image" if early else "undecodable_image", message) from error


def open_image(data: bytes, max_pixels: int, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """The image as Pillow opens it, nothing decoded yet; call it, and what decodes, within ``image_problems``.

    The checks take a few milliseconds a megabyte. Raises ImageProblem for more than ``max_pixels``, a longer side of
    more than MAX_ASPECT times the shorter, many scans, many tiny parts.
    """
    if not data:
        raise ImageProblem("empty_image")
    essential = data
    if data.startswith(b"\xff\xd8\xff"):
        essential = _without_jpeg_metadata(data)
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        essential = _without_png_metadata(data)
    elif data.startswith(b"GIF8"):
        _check_gif(data)
    elif data.startswith(b"RIFF"):
        _check_webp(data, max_pixels)
    elif data.startswith(b"BM") and data[30:34] in (b"\1\0\0\0", b"\2\0\0\0"):
        raise ImageProblem("unsupported_pixel_format", "run-length coded BMP, which is decoded in Python")
    try:
        image = Image.open(io.BytesIO(essential), formats=formats)
    except UnidentifiedImageError as error:
        raise ImageProblem("not_an_image", f"starts with {data[:12]!r}") from error
    width, height = image.size
    check_size(width, height, max_pixels)
    if image.format in ("JPEG", "MPO"):
        _check_scans(essential, width * height, max_pixels)
    return image


def upright_rgb(image: Image.Image) -> Image.Image:
    """The decoded image in mode RGB, its orientation (EXIF, else XMP) applied; call it within ``image_problems``.

    What is transparent stands on white, so that a black logo shows. Greyscale, palette, CMYK and 16-bit images are
    converted; of an animation the first frame is taken. Raises ImageProblem for floating-point pixels.
    """
    image.load()
    turn = _UPRIGHT.get(_orientation(image))
    image = _rgb(image)
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit greyscale; Pillow's own conversion would clip it to white
        levels = np.asarray(image).astype(np.int64).clip(0, 65535)
        levels[levels == image.info.get("transparency", -1)] = 65535
        return Image.fromarray((levels >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageProblem("unsupported_pixel_format", "floating-point pixels")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    if rgba.getextrema()[3][0] == 255:
        return rgba.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _orientation(image: Image.Image) -> int:
    for name in ("exif", "xmp", "XML:com.adobe.xmp"):
        if len(image.info.get(name) or b"") > MAX_METADATA_BYTES:
            del image.info[name]
    if not {"exif", "xmp", "XML:com.adobe.xmp"} & image.info.keys():
        return 1
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except _DECODE_ERRORS:
        return 1  # damaged metadata, sound pixels


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raises ImageProblem for no pixels, more than ``max_pixels``, a side of more than MAX_ASPECT times the other."""
    if min(width, height) < 1:
        raise ImageProblem("undecodable_image", f"{width}x{height}")
    if width * height > max_pixels:
        raise ImageProblem("too_many_pixels", f"{width}x{height}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageProblem("aspect_ratio", f"{width}x{height}")


class _Parts:
    """Counts the parts of a file: a walk over them in Python must not take longer than its bytes deserve."""

    def __init__(self, data: bytes) -> None:
        self._left = _FREE_PARTS + len(data) // _BYTES_PER_PART

    def count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise ImageProblem("too_many_parts", f"more than {_FREE_PARTS}, and of under {_BYTES_PER_PART} bytes each")


def _without_jpeg_metadata(data: bytes) -> bytes:
    """Tables, EXIF and XMP up to the first scan, and all from there on. ITU T.81, annex B."""
    parts, kept, position = _Parts(data), [b"\xff\xd8"], 2
    unseen = {b"JFIF\0", b"Adobe", b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"}  # the first of each is kept
    while (found := _JPEG_MARKER.search(data, position)) is not None:
        parts.count()
        begin, marker = found.start(), data[found.start() + 1]
        if marker in (0xDA, 0xD9):  # a scan, or the end
            return b"".join([*kept, data[begin:]])
        if marker in _JPEG_ALONE:
            position = begin + 2
            continue
        position = begin + 2 + int.from_bytes(data[begin + 2 : begin + 4], "big")
        segment = data[begin:position]
        if marker in _JPEG_TABLES:
            if marker != 0xC4 and len(segment) > MAX_TABLE_BYTES:  # Huffman tables are read in C
                raise ImageProblem("undecodable_image", f"a table of {len(segment)} bytes")
            kept.append(segment)
        elif marker in (0xE0, 0xE1, 0xEE) and (name := next((n for n in unseen if segment.startswith(n, 4)), None)):
            unseen.remove(name)
            kept.append(segment)
        if len(kept) > MAX_HEADER_SEGMENTS:
            raise ImageProblem("too_many_parts", f"more than {MAX_HEADER_SEGMENTS} tables")
    raise ImageProblem("truncated_image", "ends before its first scan")


def _check_scans(data: bytes, pixels: int, max_pixels: int) -> None:
    """Refuse a JPEG with many scans: a few kilobytes of empty scans keep the decoder busy for minutes."""
    most = min(MAX_SCANS, MAX_FULL_SCANS * max_pixels // pixels)
    if data.count(b"\xff\xda") <= most:  # images after the end of this one counted too
        return
    scans, position, parts = 0, 2, _Parts(data)
    while (found := _JPEG_MARKER.search(data, position)) is not None:
        parts.count()
        position, marker = found.end(), data[found.start() + 1]
        if marker == 0xD9:
            return
        scans += marker == 0xDA
        if scans > most:
            raise ImageProblem("too_many_scans", f"more than {most} in an image of {pixels} pixels")
        if marker not in _JPEG_ALONE:
            position += int.from_bytes(data[position : position + 2], "big")


def _without_png_metadata(data: bytes) -> bytes:
    """The chunks that pixels depend on, and EXIF and XMP; of an APNG the default image. W3C PNG, 5.3."""
    parts, kept, position = _Parts(data), [data[:8]], 8
    while position < len(data):
        parts.count()
        length, kind = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        end = position + 12 + length
        is_small = length <= MAX_METADATA_BYTES
        if not kind.isalpha():  # Pillow says what is wrong
            kept.append(data[position : position + 64])
            break
        is_xmp = kind == b"iTXt" and data.startswith(b"XML:com.adobe.xmp\0\0", position + 8)
        if kind in _PNG_KEPT or (is_small and (kind == b"eXIf" or is_xmp)):
            kept.append(data[position:end])
        if kind == b"IEND":
            break
        position = end
    return b"".join(kept)


def _check_gif(data: bytes) -> None:
    """Count the blocks of a GIF before its first image. GIF89a, sections 18 to 26."""
    parts, flags = _Parts(data), data[10] if len(data) > 10 else 0
    position = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    while data[position : position + 1] == b"!":
        position += 2
        while size := int.from_bytes(data[position : position + 1], "big"):
            parts.count()
            position += 1 + size
        position += 1
        parts.count()


def _check_webp(data: bytes, max_pixels: int) -> None:
    """Count the chunks of a WebP, and check its canvas, which Pillow's decoder makes as it opens. RFC 9649."""
    if data[12:16] == b"VP8X" and len(data) >= 30:
        width, height = (1 + int.from_bytes(data[begin : begin + 3], "little") for begin in (24, 27))
        check_size(width, height, max_pixels)
    parts, position = _Parts(data), 12
    while position + 8 <= len(data):
        parts.count()
        length = int.from_bytes(data[position + 4 : position + 8], "little")
        position += 8 + length + length % 2
