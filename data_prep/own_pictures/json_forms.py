"""Reads captions from JSON files: a list of objects, names with their captions, or COCO's images and annotations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.own_pictures.caption_rows import CaptionRow, CaptionSource, row_of
from data_prep.own_pictures.columns import Columns, caption_columns, choose_columns
from data_prep.record import PrepError, Rejection

_EXPECTED = 'a list of objects, {"a.jpg": "its caption"}, or COCO\'s images and annotations'
_OF_NAMES = Columns("", ("captions",), None)


def json_source(path: Path, content: Any, named: list[str]) -> CaptionSource:
    """The captions in what the JSON file ``path`` holds; raises PrepError for a form that is none of those."""
    if isinstance(content, dict) and isinstance(content.get("images"), list) and "annotations" in content:
        return _coco(path, content)
    if isinstance(content, dict) and len(content) == 1 and isinstance(next(iter(content.values())), list):
        (inner,) = content.values()
        content = inner if any(isinstance(one, dict) for one in inner) else content
    if isinstance(content, list):
        return _objects(path, content, named)
    if isinstance(content, dict) and content:
        return _by_name(path, content, named)
    raise PrepError(f"{path}: holds {'nothing' if content in ({}, []) else ascii(content)[:60]}, expected {_EXPECTED}")


def _objects(path: Path, entries: list[Any], named: list[str]) -> CaptionSource:
    header = _names_in(entries)
    if not header:
        raise PrepError(f"{path}: a list without objects, expected {_EXPECTED}")
    columns = choose_columns(header, named, path)

    def rows() -> Iterator[CaptionRow | Rejection]:
        for number, entry in enumerate(entries, start=1):
            if isinstance(entry, dict):
                yield from row_of(entry, columns, f"entry {number}")
            else:
                yield Rejection("malformed_row", f"entry {number}", f"{ascii(entry)[:80]}, expected an object")

    return CaptionSource(f"{path}: {columns}", (path,), rows, path.parent, columns, tuple(header))


def _by_name(path: Path, captions: dict[str, Any], named: list[str]) -> CaptionSource:
    """Names with a caption, a list of them, or an object that holds them."""
    header = _names_in(list(captions.values()))
    inner = Columns("", tuple(named[1:]) or caption_columns(header, path), None) if header else _OF_NAMES

    def rows() -> Iterator[CaptionRow | Rejection]:
        for number, (name, value) in enumerate(captions.items(), start=1):
            cells = value if isinstance(value, dict) else {"captions": value}
            yield from row_of({**cells, "": name}, inner if cells is value else _OF_NAMES, f"entry {number}")

    return CaptionSource(f"{path}: names of images with their captions", (path,), rows, path.parent)


def _coco(path: Path, content: dict[str, Any]) -> CaptionSource:
    images, annotations = content["images"], content["annotations"]
    if not isinstance(annotations, list):
        raise PrepError(f"{path}: `annotations` is no list, expected {_EXPECTED}")
    names = {entry["id"]: entry.get("file_name") for entry in images if _has_id(entry, "id")}

    def rows() -> Iterator[CaptionRow | Rejection]:
        for number, entry in enumerate(annotations, start=1):
            place = f"annotation {number}"
            if not _has_id(entry, "image_id"):
                yield Rejection("malformed_row", place, f"{ascii(entry)[:80]}, expected an object with image_id")
            elif entry["image_id"] not in names:
                yield Rejection(
                    "missing_image", place, f"no image of id {ascii(entry['image_id'])[:80]} in {path.name}"
                )
            else:
                cells = {"": names[entry["image_id"]], "captions": entry.get("caption")}
                yield from row_of(cells, _OF_NAMES, place)

    return CaptionSource(f"{path}: images and annotations in COCO's form", (path,), rows, path.parent)


def _has_id(entry: Any, field: str) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get(field), (int, str))


def _names_in(entries: list[Any]) -> list[str]:
    return list(dict.fromkeys(name for entry in entries[:100] if isinstance(entry, dict) for name in entry))
