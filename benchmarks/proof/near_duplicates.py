"""How many planted copies of held-out photographs decontamination finds, what else it drops, and what 10 million cost.

    python -m benchmarks.proof.near_duplicates --images FOLDER [--output FILE.json] [--sheet FILE.html]
    python -m benchmarks.proof.near_duplicates --simulated 10000000 --held-out 1000000 [--output FILE.json]

With --images every 7th photograph is held out, and copies of it (resized, recompressed, cropped by 5 %, mirrored) are
planted into a training split, a sample for each kind; the other photographs are the rest of it. A match of one of those
is counted as a false drop, unless someone finds by the page of --sheet that the two are the same picture. With
--simulated there are random hashes, planted pairs among them, and no images: seconds and peak memory of the search.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.filters import Limits
from data_prep.parallel import ordered_map
from data_prep.record import Record
from data_prep.shard_writer import SplitWriter
from data_prep.similar import near_hashes
from data_prep.similar.contact_sheet import Pair, write_sheet
from data_prep.similar.hash_files import versions
from data_prep.similar.hashing import hashes_at
from data_prep.similar.held_out import DISTANCE, held_out_matches
from data_prep.similar.repeats import DISTANCE as REPEATS_DISTANCE
from data_prep.similar.repeats import repeated_samples

HELD_OUT_EVERY = 7
SEARCH = "--search"  # a process of its own, whose peak memory is that of the search


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.search:
        print(json.dumps(search(*arguments.search)))
        return 0
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        if arguments.images is not None:
            result["photographs"] = of_photographs(arguments, Path(scratch))
        if arguments.simulated:
            result["simulated"] = of_random_hashes(arguments, Path(scratch))
    result["command"] = "python -m benchmarks.proof.near_duplicates " + " ".join(shown(argv or sys.argv[1:]))
    result["machine"] = {"cpu": cpu_name(), "cores": os.cpu_count(), "load": os.getloadavg()[0], **versions()}
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.proof.near_duplicates", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--images", type=Path, help="folder of JPEG photographs")
    parser.add_argument("--copies-of", type=int, default=1000, help="so many of the held-out photographs are copied")
    parser.add_argument("--simulated", type=int, default=0, metavar="N", help="random hashes")
    parser.add_argument("--held-out", type=int, default=1_000_000, metavar="M", help="hashes of held-out looks")
    parser.add_argument("--choices", type=int, default=0, help="of blocks, of the search among random hashes; 0: all")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--scratch", type=Path, help="folder for temporary files")
    parser.add_argument("--sheet", type=Path, help="page of the matches that were not planted")
    parser.add_argument("--output", type=Path)
    parser.add_argument(SEARCH, nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def of_photographs(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Found and planted by kind, with and without --mirror, and with the cropped copies held out instead."""
    files = sorted(arguments.images.glob("*.jpg"))
    held = files[::HELD_OUT_EVERY]
    rest = [file for number, file in enumerate(files) if number % HELD_OUT_EVERY]
    write(scratch / "held" / "test", ((file.stem, file.read_bytes()) for file in held))
    write(scratch / "rest" / "train", ((file.stem, file.read_bytes()) for file in rest))
    planted = held[: arguments.copies_of]
    copies = ordered_map(copies_of, planted, arguments.workers)
    write(scratch / "copies" / "train", ((key, content) for some in copies for key, content in some))
    sets = {name: hashes_at(scratch / name / split, arguments.workers, Limits.max_pixels) for name, split in SPLITS}
    result: dict[str, Any] = {"held_out": len(held), "others": len(rest)}
    for mirrored in (False, True):
        name = "with --mirror" if mirrored else "without"
        found = Counter(
            kind_of(sets["copies"].key(match.row))
            for match in held_out_matches(sets["copies"], [sets["held"]], mirrored=mirrored, workers=arguments.workers)
            if sets["held"].key(match.other_row) == source_of(sets["copies"].key(match.row))
        )
        wrong = held_out_matches(sets["rest"], [sets["held"]], mirrored=mirrored, workers=arguments.workers)
        result[name] = {"found": dict(found), "matches_among_others": len(wrong)}
        if arguments.sheet is not None and mirrored:
            sides = [(sets["rest"], scratch / "rest" / "train"), (sets["held"], scratch / "held" / "test")]
            pairs = [
                Pair((*sides[0], match.row), (*sides[1], match.other_row), match.detail([sets["held"]]))
                for match in wrong
            ]
            write_sheet(arguments.sheet, pairs, "Matches that were not planted")
    turned = held_out_matches(sets["held"], [sets["copies"]], mirrored=False, workers=arguments.workers)
    result["held_out_found_by_any_of_their_copies"] = len(turned)
    result["copies_held_out"] = by_kind_turned(sets, scratch, arguments.workers)
    result["planted_of_each_kind"] = len(planted)
    result["repeats_among_all"] = len(repeated_samples([sets["held"], sets["rest"]], workers=arguments.workers))
    return result


SPLITS = (("held", "test"), ("rest", "train"), ("copies", "train"))


def by_kind_turned(sets: dict[str, Any], scratch: Path, workers: int) -> dict[str, int]:
    """Originals found where the copies of one kind are held out."""
    found = {}
    for kind in ("corner_5", "each_side_5", "somewhere_5"):
        names = [key for key in map(sets["copies"].key, range(len(sets["copies"].hashes))) if kind_of(key) == kind]
        contents = {key: content for key, content in read_all(scratch / "copies" / "train", set(names))}
        folder = write(scratch / f"only_{kind}" / "test", ((key, contents[key]) for key in names))
        other = hashes_at(folder, workers, Limits.max_pixels)
        matches = held_out_matches(sets["held"], [other], workers=workers)
        found[kind] = sum(source_of(other.key(one.other_row)) == sets["held"].key(one.row) for one in matches)
    return found


def read_all(split_dir: Path, names: set[str]) -> list[tuple[str, bytes]]:
    found = []
    for path in sorted(split_dir.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                if extension == "jpg" and key in names:
                    found.append((key, tar.extractfile(member).read()))
    return found


def copies_of(file: Path) -> list[tuple[str, bytes]]:
    """A copy of each kind of a photograph, by key; what is random is drawn from its name."""
    draw, image = random.Random(file.stem), Image.open(file).convert("RGB")
    left, top = draw.random() * 0.05, draw.random() * 0.05
    kinds: dict[str, Callable[[], bytes]] = {
        **{f"quality_{quality}": lambda q=quality: jpeg(image, q) for quality in (30, 60, 95)},
        "half_size": lambda: jpeg(resized(image, 0.5), 85),
        "third_size": lambda: jpeg(resized(image, 0.33), 85),
        "larger": lambda: jpeg(resized(image, 1.5), 85),
        "square_224": lambda: jpeg(image.resize((224, 224), Image.Resampling.BICUBIC), 85),
        "one_side_5": lambda: jpeg(cropped(image, 0.05, 0, 0, 0), 75),
        "corner_5": lambda: jpeg(cropped(image, 0.05, 0, 0, 0.05), 75),
        "each_side_5": lambda: jpeg(cropped(image, 0.05, 0.05, 0.05, 0.05), 75),
        "somewhere_5": lambda: jpeg(cropped(image, left, top, 0.05 - left, 0.05 - top), 75),
        "somewhere_5_resized_recompressed": lambda: jpeg(
            resized(cropped(image, left, top, 0.05 - left, 0.05 - top), draw.uniform(0.4, 1.2)), draw.randint(30, 95)
        ),
        "mirrored": lambda: jpeg(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), 75),
        "mirrored_somewhere_5": lambda: jpeg(
            cropped(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), left, top, 0.05 - left, 0.05 - top), 75
        ),
    }
    return [(f"{file.stem}-{kind}", make()) for kind, make in kinds.items()]


def kind_of(key: str) -> str:
    return key.partition("-")[2]


def source_of(key: str) -> str:
    return key.partition("-")[0]


def jpeg(image: Image.Image, quality: int) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def resized(image: Image.Image, scale: float) -> Image.Image:
    width, height = image.size
    return image.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BICUBIC)


def cropped(image: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    width, height = image.size
    return image.crop(
        (round(left * width), round(top * height), round(width * (1 - right)), round(height * (1 - bottom)))
    )


def write(split_dir: Path, images: Any) -> Path:
    with SplitWriter(split_dir, split_dir.parent.name, split_dir.name) as writer:
        for key, content in images:
            writer.add(Record(key, (content,), ("a photograph",), {}, ("jpg",)))
    return split_dir


def of_random_hashes(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Seconds and peak memory of a process that searches, beside a process that only imports what it needs."""
    numbers = np.random.default_rng(0)
    draw = lambda count: numbers.integers(1, 2**64, count, dtype=np.uint64)  # noqa: E731
    hashes, held = draw(arguments.simulated), draw(arguments.held_out)
    near = hashes[:1000]
    for _ in range(4):
        near = near ^ (np.uint64(1) << numbers.integers(0, 64, len(near), dtype=np.uint64))
    numbers.shuffle(hashes)
    np.save(scratch / "hashes.npy", np.concatenate([hashes, near]))
    np.save(scratch / "held.npy", np.unique(np.concatenate([held, near])))
    found = {"hashes": arguments.simulated, "held_out_hashes": arguments.held_out, "planted": len(near)}
    for name in ("nothing", "sort", "repeats", "held_out"):
        command = [sys.executable, "-m", "benchmarks.proof.near_duplicates", SEARCH, name, str(scratch)]
        done = subprocess.run(
            [*command, str(arguments.workers), str(arguments.choices)], capture_output=True, text=True, check=True
        )
        found[name] = json.loads(done.stdout)
        print(name, found[name], file=sys.stderr)
    return found


def search(name: str, folder: str, workers: str, choices: str) -> dict[str, Any]:
    """One search over the files of ``folder``, and what it took."""
    start, scratch, result = time.monotonic(), Path(folder), {}
    if name == "sort":
        hashes = np.load(scratch / "hashes.npy", mmap_mode="r")
        near_hashes.write_distinct(hashes, scratch / "distinct.npy")
    elif name == "repeats":
        pairs = near_hashes.pairs_within(scratch / "distinct.npy", REPEATS_DISTANCE, int(workers))
        result = {"distance": REPEATS_DISTANCE, **counted(pairs, int(choices))}
    elif name == "held_out":
        files = scratch / "distinct.npy", scratch / "held.npy"
        pairs = near_hashes.pairs_between(*files, DISTANCE, int(workers))
        result = {"distance": DISTANCE, **counted(pairs, int(choices))}
    used = resource.getrusage(resource.RUSAGE_SELF)
    result["cpu_seconds"] = round(used.ru_utime + used.ru_stime, 1)  # of this process; with one worker that is all
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {"seconds": round(time.monotonic() - start, 1), "peak_mib": round(peak / 1024), **result}


def counted(pairs: Iterable[np.ndarray], choices: int) -> dict[str, int]:
    """How many pairs the first ``choices`` of blocks give, 0: all; each takes as long as any other."""
    sizes = [len(part) for part in itertools.islice(pairs, choices or None)]
    return {"pairs": sum(sizes), "choices_of_blocks": len(sizes)}


def shown(argv: Sequence[str]) -> list[str]:
    """The arguments without the folders of this machine."""
    return [word if not word.startswith("/") else Path(word).name for word in argv]


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    raise SystemExit(main())
