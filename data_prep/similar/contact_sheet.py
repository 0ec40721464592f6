"""A page of pairs of images to look at, in one HTML file."""

from __future__ import annotations

import html
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from data_prep.manifest import is_split, read_manifest, write_atomically
from data_prep.similar.hash_files import HashSet
from data_prep.similar.pictures import GREY_BYTES, SIDE
from data_prep.similar.split_samples import image_fields, samples_of, spans_of
from data_prep.thumbnails import thumbnail

_GREY_PX = 100
_HEAD = """<!doctype html><meta charset="utf-8"><title>Near-duplicates</title><style>
body{font:14px sans-serif;margin:2em}div{display:inline-block;margin:.5em;padding:.5em;border:1px solid #bbb}
img{max-width:200px;max-height:200px;margin-right:.5em}p{margin:.2em 0;max-width:26em;overflow-wrap:anywhere}
</style>"""


class Pair(NamedTuple):
    """Two images, each by its hashes, where its split lies (None: not here) and its row; what is said of them."""

    one: tuple[HashSet, Path | None, int]
    other: tuple[HashSet, Path | None, int]
    line: str


def write_sheet(path: Path, pairs: Iterable[Pair], title: str) -> None:
    """Write the page; an image whose split is not here is shown as its small grey picture."""
    rows = []
    for pair in pairs:
        images = "".join(f'<img src="{_thumbnail(*one)}">' for one in (pair.one, pair.other))
        rows.append(f"<div>{images}<p>{html.escape(pair.line)}</p></div>")
    write_atomically(path, f"{_HEAD}<h1>{html.escape(title)}</h1>\n" + "\n".join(rows) + "\n")


def _thumbnail(found: HashSet, split_dir: Path | None, row: int) -> str:
    content = None if split_dir is None else _content_of(split_dir, row // found.about.num_images, row)
    grey = found.pictures[row][:GREY_BYTES].reshape(SIDE, SIDE)
    return thumbnail(content) or thumbnail(Image.fromarray(grey).resize((_GREY_PX, _GREY_PX)))


def _content_of(split_dir: Path, sample: int, row: int) -> bytes | None:
    """The encoded image of a row of hashes; None where its split is not here any more."""
    if not is_split(split_dir):
        return None
    manifest = read_manifest(split_dir)
    fields = image_fields(split_dir, manifest)
    for shard in manifest.shards:
        if sample >= shard.samples:
            sample -= shard.samples
            continue
        samples = samples_of(split_dir, manifest, shard)
        span = spans_of(samples.index[samples.first_rows[sample]], manifest, fields)[row % len(fields)]
        if span is None:
            return None
        with open(split_dir / shard.file, "rb") as stream:
            stream.seek(span[0])
            return stream.read(span[1])
    return None
