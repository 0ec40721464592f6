"""Measures how fast a folder of pictures becomes a corpus, against decoding every picture of it once.

    python -m benchmarks.cost.local_folder --images DIR [--side 640] [--number 2000] [--rounds 3] [--output FILE]

In each round two commands run one after another, imports and all, with as many processes: Pillow alone, which reads
and decodes each file, and `data_prep local`, whose captions are the files' names. The ratio is of one round; the
folder is read once before, so that both find it in memory. With --side it is copies that are measured, of so many
pixels on the longer side: what is done for each picture besides decoding weighs the more, the smaller they are.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing import Pool
from pathlib import Path

from PIL import Image

from benchmarks.cost.loading import machine
from tests.data_prep.parts.image_server import REPOSITORY


def main() -> int:
    arguments = parse_arguments()
    if arguments.decode:
        return decode_all(arguments.images, arguments.workers)
    rounds = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.side or arguments.number:
            arguments.images = copies(arguments, folder / "pictures")
        paths = pictures(arguments.images)
        size = sum(len(path.read_bytes()) for path in paths)
        rows = "".join(f"{json.dumps({'file': path.name, 'caption': f'picture {path.stem}'})}\n" for path in paths)
        (folder / "captions.jsonl").write_text(rows)
        for _ in range(arguments.rounds):
            rounds.append({way: seconds(words) for way, words in commands(arguments, folder).items()})
            shutil.rmtree(folder / "corpus")
    ratios = [one["decoding"] / one["data_prep local"] for one in rounds]
    result = {
        "pictures": len(paths),
        "mean_kib": round(size / len(paths) / 1024, 1),
        "workers": arguments.workers,
        "seconds": rounds,
        "speed_of_preparing_in_that_of_decoding": {"median": statistics.median(ratios), "rounds": ratios},
        "command": "python -m benchmarks.cost.local_folder --images DIR " + shown(arguments),
        "machine": machine(),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="a folder of JPEG files")
    parser.add_argument("--side", type=int, help="measure copies, their longer side of so many pixels, JPEG quality 90")
    parser.add_argument("--number", type=int, help="the first pictures alone")
    parser.add_argument("--workers", type=int, default=2, help="processes of either command (default: 2)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--decode", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def pictures(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.jpg"))


def copies(arguments: argparse.Namespace, folder: Path) -> Path:
    folder.mkdir()
    for path in pictures(arguments.images)[: arguments.number]:
        with Image.open(path) as image:
            scale = (arguments.side or max(image.size)) / max(image.size)
            sides = tuple(max(1, round(scale * side)) for side in image.size)
            image.convert("RGB").resize(sides, Image.Resampling.BICUBIC).save(folder / path.name, quality=90)
    return folder


def shown(arguments: argparse.Namespace) -> str:
    words = {name: getattr(arguments, name) for name in ("side", "number", "workers", "rounds")}
    return " ".join(f"--{name} {value}" for name, value in words.items() if value)


def decode_all(folder: Path, workers: int) -> int:
    with Pool(workers) as pool:
        return 0 if sum(pool.imap(decode, pictures(folder), chunksize=32)) else 1


def decode(path: Path) -> int:
    with Image.open(path) as image:
        return image.convert("RGB").width


def commands(arguments: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    shared = ["--images", str(arguments.images.resolve()), "--workers", str(arguments.workers)]
    local = ["--captions", str(folder / "captions.jsonl"), "--output", str(folder / "corpus")]
    return {
        "decoding": [sys.executable, "-m", "benchmarks.cost.local_folder", "--decode", *shared],
        "data_prep local": [sys.executable, "-m", "data_prep", "local", *shared, *local],
    }


def seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return round(time.perf_counter() - began, 2)


if __name__ == "__main__":
    sys.exit(main())
