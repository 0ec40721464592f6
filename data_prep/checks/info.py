"""Describes prepared data: counts, sizes, caption lengths, rejected records, provenance."""

from __future__ import annotations

import io
import itertools
import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.images import image_problems, open_image
from data_prep.manifest import (
    IndexColumns,
    Manifest,
    ManifestError,
    index_columns,
    is_split,
    open_index,
    read_manifest,
)
from data_prep.passport import PASSPORT, STAGES
from data_prep.shard_members import in_own_form, row_text

_IMAGE_SAMPLE, _HOSTS_SHOWN = 200, 5
_MAX_MEMBER_BYTES = 256 * 2**20  # as in training


def all_splits(path: Path) -> list[Path]:
    """Every finished split at or below ``path`` (a split, a corpus or a root of corpora), hidden folders left out."""
    path = Path(path)
    if not path.is_dir():
        raise ManifestError(f"{path}: no such folder; run `python -m data_prep synth` first")
    below = _folders(path)
    folders = [path, *below, *(deeper for folder in below for deeper in _folders(folder))]
    splits = [folder for folder in folders if is_split(folder) or any(folder.glob("*.tar"))]
    if not splits:
        raise ManifestError(f"{path}: nothing prepared here; run `python -m data_prep synth` first")
    return splits


def _folders(path: Path) -> list[Path]:
    """The visible folders in one; none in a split, whose thousands of files need not be listed."""
    if is_split(path):
        return []
    with os.scandir(path) as entries:
        return sorted(path / entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def row_texts(split_dir: Path, manifest: Manifest) -> Iterator[str]:
    """The caption of every row, in index order."""
    columns = index_columns(manifest.fields)
    for shard in manifest.shards:
        index = open_index(split_dir, manifest, shard)
        with open(split_dir / shard.file, "rb") as stream:
            for number, row in enumerate(index.tolist()):
                try:
                    text, meta = (_read(stream, row, columns, name) for name in ("text", "meta"))
                    text = None if text is None else text.decode()
                    found = None if meta is None else json.loads(meta)
                    caption = row_text(text, in_own_form(found, text, manifest.caption_key), row[columns.caption])
                except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, OSError) as error:
                    raise ManifestError(
                        f"{split_dir / shard.file}: row {number} of its index has no caption ({error}); "
                        "`python -m data_prep verify` says what is damaged"
                    ) from error
                yield caption


def _read(
    stream: io.BufferedReader, row: Sequence[int] | dict[int, int], columns: IndexColumns, name: str
) -> bytes | None:
    if name not in columns.offset or row[columns.offset[name]] < 0:
        return None
    size = row[columns.size[name]]
    if not 0 <= size <= _MAX_MEMBER_BYTES:
        raise ValueError(f"{name} of {size} bytes")
    stream.seek(row[columns.offset[name]])
    return stream.read(size)


def describe_split(split_dir: Path) -> dict[str, Any]:
    """Numbers about one split; ``image_pixels`` (width x height: count) is a sample of the first images or clips."""
    manifest = read_manifest(split_dir)
    lengths = sorted(len(text.split()) for text in row_texts(split_dir, manifest))
    return {
        "path": str(split_dir),
        "corpus": manifest.corpus,
        "split": manifest.split,
        "rows": manifest.rows,
        "samples": manifest.samples,
        "shards": len(manifest.shards),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "images_per_sample": manifest.num_images,
        "image_pixels": _image_sizes(split_dir, manifest),
        "caption_words": _summary(lengths),
        "rejected": manifest.rejected,
        "provenance": manifest.provenance,
        "fingerprint": manifest.fingerprint(),
    }


def _summary(lengths: list[int]) -> dict[str, float]:
    if not lengths:
        return {}
    return {
        "min": lengths[0],
        "median": statistics.median(lengths),
        "mean": round(statistics.fmean(lengths), 2),
        "p99": lengths[min(len(lengths) - 1, int(0.99 * len(lengths)))],
        "max": lengths[-1],
    }


def _image_sizes(split_dir: Path, manifest: Manifest) -> dict[str, int]:
    sizes: dict[str, int] = {}
    if not manifest.shards:
        return {}
    shard = manifest.shards[0]
    columns = index_columns(manifest.fields)
    index = open_index(split_dir, manifest, shard)
    name = "meta" if manifest.is_video else "image"  # of a clip preparing wrote its size down
    if name not in columns.offset:
        return {}
    place = [columns.offset[name], columns.size[name]]
    with open(split_dir / shard.file, "rb") as stream:
        for row in itertools.islice(dict.fromkeys(tuple(row) for row in index[:, place].tolist()), _IMAGE_SAMPLE):
            try:
                content = _read(stream, dict(zip(place, row)), columns, name) or b""
                size = _frame_size(content) if manifest.is_video else _image_size(content)
            except (OSError, ValueError, RecursionError):  # ImageProblem is one
                size = "unreadable"
            sizes[size] = sizes.get(size, 0) + 1
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def _image_size(content: bytes) -> str:
    with image_problems(), open_image(content, sys.maxsize) as image:
        return f"{image.width}x{image.height}"


def _frame_size(meta: bytes) -> str:
    """Of the JSON of a clip; raises ValueError."""
    content = json.loads(meta)
    found = content.get("frame_size") if isinstance(content, dict) else None
    if not isinstance(found, list) or [type(side) for side in found] != [int, int]:
        raise ValueError("no size of its frames")
    return f"{found[0]}x{found[1]}"


def format_table(descriptions: list[dict[str, Any]]) -> str:
    """A table as text: one line per split, then the rejected records by reason."""
    header = ("corpus/split", "rows", "samples", "shards", "MiB", "images", "pixels", "words min/median/p99/max")
    lines = [header]
    for split in descriptions:
        words, pixels = split["caption_words"], split["image_pixels"]
        common = next(iter(pixels), "-") + (f" +{len(pixels) - 1} sizes" if len(pixels) > 1 else "")
        lines.append(
            (
                f"{split['corpus']}/{split['split']}",
                str(split["rows"]),
                str(split["samples"]),
                str(split["shards"]),
                f"{split['bytes'] / 2**20:.1f}",
                str(split["samples"] * split["images_per_sample"]),
                common,
                "/".join(f"{words[name]:g}" for name in ("min", "median", "p99", "max")) if words else "-",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    for split in descriptions:
        for reason, count in split["rejected"].items():
            text.append(f"rejected in {split['corpus']}/{split['split']}: {count} {reason}")
        if PASSPORT in split["provenance"]:
            text += _passport_lines(f"{split['corpus']}/{split['split']}", split["provenance"][PASSPORT])
    return "\n".join(text)


def _passport_lines(name: str, passport: dict[str, Any]) -> list[str]:
    """Where the rows went, and the hosts that most of them came from; ``--json`` has the whole."""
    try:
        rows = passport["rows"]
        by_stage = ", ".join(
            f"{rows[f'rejected_by_{stage}']}{' rejected' * (stage == STAGES[0])} by {stage}" for stage in STAGES
        )
        is_whole = rows["read"] == rows["written"]
        lines = [] if is_whole else [f"rows of {name}: {rows['read']} read, {by_stage}, {rows['written']} written"]
        hosts = [
            f"{host} {one['written']} of {one['written'] + sum(one['rejected'].values())}"
            for host, one in itertools.islice(passport["hosts"].items(), _HOSTS_SHOWN)
        ]
        return lines + ([f"hosts of {name}: {', '.join(hosts)}"] if hosts else [])
    except (KeyError, TypeError, AttributeError) as error:
        return [f"passport of {name}: can't be read (misses or mistypes {error})"]
