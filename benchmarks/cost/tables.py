"""How fast published tables and archives of images are read, and how many bytes a pixel has that is stored.

    python -m benchmarks.cost.tables --photographs PHOTOGRAPHS --output benchmarks/results/tables.json

A table in CC12M's form is made, read as `cc12m` reads it, and by the standard library's csv as a reference. The
photographs of a folder are read in a random order from the folder, a zip, a tar and a compressed tar of them (opening
included), and shrunk as ``--image-size`` does it.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_prep.filters import Limits, check_image
from data_prep.image_places import open_places
from data_prep.images import open_image
from data_prep.sources.conceptual import conceptual_columns, conceptual_rows

SIDES = (112, 160, 192)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost.tables", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=400_000, help="of the table (default 400000)")
    parser.add_argument("--photographs", type=Path, help="folder of images, of which 500 are taken")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write the figures as JSON here")
    arguments = parser.parse_args(argv)
    from benchmarks.cost.loading import machine

    command = "python -m benchmarks.cost.tables --photographs PHOTOGRAPHS"
    result: dict[str, Any] = {"command": command, "machine": machine(), "rows": arguments.rows}
    with tempfile.TemporaryDirectory() as scratch:
        result["cpu_seconds_of_table"] = of_table(Path(scratch) / "cc12m.tsv", arguments.rows, arguments.repeats)
        if arguments.photographs is not None:
            files = sorted(path for path in arguments.photographs.iterdir() if path.is_file())
            files = files[:: max(1, len(files) // 500)][:500]
            result["photographs"] = len(files)
            result["cpu_seconds_of_places"] = of_places(Path(scratch), files, arguments.repeats)
            result["stored_bytes_per_pixel"] = {side: bytes_per_pixel(files, side) for side in SIDES}
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    json.dump(result, sys.stdout, indent=1)
    return 0


def of_table(path: Path, rows: int, repeats: int) -> dict[str, list[float]]:
    with open(path, "w") as stream:
        for number in range(rows):
            address = f"https://host{number % 5000}.example.org/some/path/image_{number}.jpg"
            stream.write(f"{address}\ta photograph number {number} of a dog on the beach at sunset\n")

    def reference() -> None:
        with open(path, newline="") as stream:
            assert sum(1 for _ in csv.reader(stream, delimiter="\t")) == rows

    def ours() -> None:
        assert sum(1 for _ in conceptual_rows(path, *conceptual_columns(path))) == rows

    return rounds({"csv": reference, "cc12m": ours}, repeats)


def of_places(scratch: Path, files: list[Path], repeats: int) -> dict[str, list[float]]:
    with zipfile.ZipFile(scratch / "a.zip", "w") as archive:
        for file in files:
            archive.write(file, f"images/{file.name}")
    for name, mode in (("a.tar", "w"), ("a.tar.gz", "w:gz")):
        with tarfile.open(scratch / name, mode) as archive:
            for file in files:
                archive.add(file, f"images/{file.name}")
    (scratch / "folder").mkdir()
    for file in files:
        (scratch / "folder" / file.name).write_bytes(file.read_bytes())
    names = [file.name for file in files]
    random.Random(0).shuffle(names)

    def read(place: Path) -> None:
        with open_places([place]) as places:
            assert all(places.find([name]).read(1 << 30) for name in names)

    places = {name: scratch / name for name in ("folder", "a.zip", "a.tar", "a.tar.gz")}
    return rounds({name: lambda place=place: read(place) for name, place in places.items()}, repeats)


def bytes_per_pixel(files: list[Path], side: int) -> float:
    """Of images whose shorter side is shrunk to ``side``, as shards hold them."""
    stored = [check_image(file.read_bytes(), Limits(image_size=side))[0] for file in files]
    pixels = 0
    for content in stored:
        width, height = open_image(content, 50_000_000).size
        pixels += width * height
    return statistics.fmean(map(len, stored)) * len(stored) / pixels


def rounds(ways: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each way, one of each in every round."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            begin = time.process_time()
            way()
            found[name].append(round(time.process_time() - begin, 4))
    return found


if __name__ == "__main__":
    raise SystemExit(main())
