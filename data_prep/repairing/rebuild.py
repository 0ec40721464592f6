"""Makes the index of a shard from its tar, by the rule by which shards are written."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np

from data_prep.checks.tar_walk import Member, sample_starts, walk_headers
from data_prep.manifest import index_columns

_IMAGES = ("jpg", "jpeg", "png", "webp")
_VIDEOS = ("mp4", "webm", "mkv", "avi", "mov")
_MAX_META_BYTES = 256 * 2**20  # as in training


def rebuild_index(path: Path, fields: tuple[str, ...], dropped: set[int]) -> np.ndarray:
    """The index of the tar at ``path``, int64 [rows, 2*F+1], without the samples that begin at ``dropped`` and those
    that have no text or not all ``fields`` that hold images or a clip. Raises OSError."""
    columns = index_columns(fields)
    samples: dict[int, list[Member]] = {}
    members = walk_headers(path).members
    for member, start in zip(members, sample_starts(members)):
        if member.kind == "file" and start not in dropped:
            samples.setdefault(start, []).append(member)
    rows: list[list[int]] = []
    with open(path, "rb") as stream:
        for sample in samples.values():
            places = {field: member for member in sample if (field := _field(member.extension.lower()))}
            if any(field not in places for field in fields if field.startswith(("image", "video"))):
                continue
            row = [-1] * columns.width
            for field, member in places.items():
                if field in fields:
                    row[columns.offset[field]], row[columns.size[field]] = member.offset, member.size
            rows += [[*row[:-1], number] for number in range(_num_captions(stream, places))]
    return np.asarray(rows, dtype=np.int64).reshape(len(rows), columns.width)


def index_bytes(index: np.ndarray) -> bytes:
    """The file of an index, as the writer of shards makes it."""
    buffer = io.BytesIO()
    np.save(buffer, index, allow_pickle=False)
    return buffer.getvalue()


def _field(extension: str) -> str:
    """The field of a member by its extension: "jpg" of the image, "1.jpg" of the second of several."""
    if extension in ("txt", "json"):
        return {"txt": "text", "json": "meta"}[extension]
    number, _, kind = extension.rpartition(".")
    if kind in _VIDEOS and not number:
        return "video"
    if kind not in _IMAGES or not (number.isdecimal() or not number):
        return ""
    return f"image{number}" if number.strip("0") else "image"


def _num_captions(stream: io.BufferedReader, places: dict[str, Member]) -> int:
    """Rows of a sample: as many as its JSON lists captions, one of a text alone, none of neither."""
    if "meta" in places and places["meta"].size <= _MAX_META_BYTES:
        stream.seek(places["meta"].offset)
        try:
            captions = json.loads(stream.read(places["meta"].size)).get("captions")
        except (ValueError, AttributeError, RecursionError):
            return 0
        if captions is not None:
            return len(captions) if isinstance(captions, list) else 0
    return 1 if "text" in places else 0
