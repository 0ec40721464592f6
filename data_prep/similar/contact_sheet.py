"""A page of pairs of images to look at, in one HTML file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from data_prep.filters import Limits
from data_prep.images import ImageProblem, image_problems, open_image, upright_rgb
from data_prep.manifest import is_split, read_manifest, write_atomically
from data_prep.similar.hash_files import HashSet
from data_prep.similar.pictures import GREY_BYTES, SIDE
from data_prep.similar.split_samples import image_fields, samples_of, spans_of

_SIDE = 200
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
        images = "".join(f'<img src="data:image/jpeg;base64,{_thumbnail(*one)}">' for one in (pair.one, pair.other))
        rows.append(f"<div>{images}<p>{html.escape(pair.line)}</p></div>")
    write_atomically(path, f"{_HEAD}<h1>{html.escape(title)}</h1>\n" + "\n".join(rows) + "\n")


def _thumbnail(found: HashSet, split_dir: Path | None, row: int) -> str:
    image = None if split_dir is None else _image_of(split_dir, row // found.about.num_images, row)
    if image is None:
        grey = found.pictures[row][:GREY_BYTES].reshape(SIDE, SIDE)
        image = Image.fromarray(grey).convert("RGB").resize((_SIDE // 2, _SIDE // 2))
    image.thumbnail((_SIDE, _SIDE))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=80)
    return base64.b64encode(stream.getvalue()).decode()


def _image_of(split_dir: Path, sample: int, row: int) -> Image.Image | None:
    """The image of a row of hashes; None where it cannot be decoded."""
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
            content = stream.read(span[1])
        try:
            with image_problems():
                return upright_rgb(open_image(content, Limits.max_pixels))
        except ImageProblem:
            return None
    return None
