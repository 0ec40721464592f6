"""Small splits whose content is known, for tests of what looks at splits."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

from PIL import Image

from data_prep.filters import Limits
from data_prep.manifest import Manifest
from data_prep.prepare import fill_split, provenance
from data_prep.record import Record, Rejection
from data_prep.shard_writer import SplitWriter


def jpeg(grey: int = 0, size: tuple[int, int] = (24, 24)) -> bytes:
    stream = io.BytesIO()
    Image.new("L", size, grey).save(stream, "JPEG")
    return stream.getvalue()


def records(number: int = 6) -> list[Record | Rejection]:
    """Samples k0, k1, ... of two captions each, and two rows that are not there."""
    meta = [{"url": f"http://host{i % 2}.org/{i}.jpg", "number": i} for i in range(number)]
    kept = [Record(f"k{i}", (jpeg(10 * i),), (f"caption {i}", f"ein Größe {i}"), meta[i]) for i in range(number)]
    return [*kept, Rejection("http_404", "row 7: http://host1.org/x.jpg", "gone"), Rejection("malformed_row", "row 8")]


def write_split(folder: Path, items: list[Record | Rejection] | None = None, **options: object) -> Manifest:
    """The split ``folder``, of two samples a shard."""
    origin = provenance("data_prep test", {"files": {}})
    options = {"samples_per_shard": 2, "provenance": origin, **options}
    writer = SplitWriter(folder, folder.parent.name, folder.name, **options)
    return fill_split(writer, records() if items is None else items, Limits(), workers=1)


def write_unchecked(folder: Path, kept: list[Record], **options: object) -> Manifest:
    """A split of records that no filter has seen, images as .jpg."""
    writer = SplitWriter(folder, folder.parent.name, folder.name, **{"samples_per_shard": 2, **options})
    with writer:
        for record in kept:
            writer.add(record)
    return writer.manifest


def state(folder: Path) -> dict[str, tuple[str, int]]:
    """Hash and time of change of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
