"""Tells which container a clip is in, and counts what its tables announce before a demuxer believes them."""

from __future__ import annotations

from collections.abc import Iterator

from data_prep.images import ImageProblem

MAX_TABLE_SAMPLES = 1 << 24  # frames and pieces of sound that an MP4 may announce: 24 bytes each in the demuxer
MAX_BOXES = 100_000  # of an MP4's tables, which are walked here
_MP4_BEGINNINGS = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")
_MP4_PARENTS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf")


def container_of(data: bytes) -> tuple[str, str] | None:
    """The demuxer of a clip and the extension that it is stored with, by its first bytes; None for other bytes.

    MP4 and QuickTime (ISO/IEC 14496-12, 4.3), Matroska and WebM (RFC 8794, 11.2), AVI.
    """
    if data[4:8] in _MP4_BEGINNINGS:
        return "mov", "mov" if data[4:12] == b"ftypqt  " or data[4:8] != b"ftyp" else "mp4"
    if data.startswith(b"\x1a\x45\xdf\xa3"):
        return "matroska", "webm" if b"webm" in data[:64] else "mkv"
    if data.startswith(b"RIFF") and data[8:12] == b"AVI ":
        return "avi", "avi"
    return None


def check_tables(data: bytes) -> None:
    """Refuse an MP4 whose tables announce more samples than MAX_TABLE_SAMPLES: a number of four bytes makes the
    demuxer take gigabytes. ISO/IEC 14496-12, 8.7.3 and 8.8.8. Raises ImageProblem.
    """
    announced = 0
    for number, (kind, begin, end) in enumerate(_boxes(data, 0, len(data))):
        if number >= MAX_BOXES:
            raise ImageProblem("too_many_parts", f"more than {MAX_BOXES} boxes")
        if kind == b"cmov":
            raise ImageProblem("undecodable_video", "its tables are compressed")
        if kind in (b"stsz", b"stz2"):
            announced += int.from_bytes(data[begin + 8 : min(begin + 12, end)], "big")
        elif kind == b"trun":
            announced += int.from_bytes(data[begin + 4 : min(begin + 8, end)], "big")
        if announced > MAX_TABLE_SAMPLES:
            raise ImageProblem("too_many_frames", f"its tables announce more than {MAX_TABLE_SAMPLES} samples")


def _boxes(data: bytes, begin: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(kind, begin and end of the content) of the boxes in a range, and of those in the parents of tables."""
    left = [(begin, end)]
    while left:
        position, end = left.pop()
        while position + 8 <= end:
            size, kind, header = (
                int.from_bytes(data[position : position + 4], "big"),
                data[position + 4 : position + 8],
                8,
            )
            if size == 1:
                size, header = int.from_bytes(data[position + 8 : position + 16], "big"), 16
            stop = end if size == 0 else min(position + size, end)
            yield kind, position + header, stop
            if kind in _MP4_PARENTS:
                left.append((position + header, stop))
            if stop < position + header:
                break
            position = stop
