"""How fast the doctor reads shards without decoding, against sha256sum and against reading alone.

    python -m benchmarks.cost.doctor --data data/flickr8k/train --output benchmarks/results/doctor.json

All ways read the same tars, which are in the page cache; they alternate within a round, a ratio is of two runs of one
round. Without --data a split of random bytes is written: samples of --sample-kib in shards of 1,000 of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_prep.checks.verify import verify_files
from data_prep.manifest import Manifest, load_manifest
from data_prep.record import Record
from data_prep.shard_writer import SplitWriter

CHUNK = 1 << 20


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost.doctor", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a prepared split (default: one is made)")
    parser.add_argument("--mib", type=int, default=512, help="size of the split that is made (default 512)")
    parser.add_argument("--sample-kib", type=int, default=100, help="bytes of its images (default 100)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, in alternating order (default 5)")
    parser.add_argument("--output", type=Path, help="write the figures as JSON here")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        split_dir = arguments.data or make_split(Path(scratch) / "c" / "train", arguments.mib, arguments.sample_kib)
        result = measure(split_dir, load_manifest(split_dir), arguments.repeats)
    result["command"] = "python -m benchmarks.cost.doctor " + " ".join(
        word for word in (argv if argv is not None else sys.argv[1:]) if os.sep not in word
    )
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(as_markdown(result))
    return 0


def make_split(split_dir: Path, mib: int, sample_kib: int) -> Path:
    """A split of images that are none: hashing and headers do not ask."""
    chance = random.Random(0)
    with SplitWriter(split_dir, "c", "train", samples_per_shard=1000) as writer:
        for number in range(mib * 1024 // sample_kib):
            content = chance.randbytes(sample_kib * 1024)
            writer.add(Record(f"{number:09d}", (content,), (f"sample {number}",), {"number": number}, ("jpg",)))
    return split_dir


def measure(split_dir: Path, manifest: Manifest, repeats: int) -> dict[str, Any]:
    """Bytes per second of each way in every round."""
    files = [split_dir / shard.file for shard in manifest.shards]
    size = sum(manifest.shards.bytes.tolist())
    ways: dict[str, Callable[[], object]] = {
        "read": lambda: [read(file, lambda chunk: None) for file in files],
        "hashlib": lambda: [read(file, hashlib.sha256().update) for file in files],
        "sha256sum": lambda: subprocess.run(["sha256sum", *files], check=True, stdout=subprocess.DEVNULL),
        "doctor": lambda: healthy(split_dir, manifest, 1),
        "doctor, 2 workers": lambda: healthy(split_dir, manifest, 2),
    }
    ways["read"]()  # into the page cache
    rounds = []
    for repeat in range(repeats):
        names = list(ways) if repeat % 2 else list(reversed(ways))
        rounds.append({name: timed(ways[name], size) for name in names})
    return {
        "bytes": size,
        "shards": len(files),
        "samples": manifest.samples,
        "rounds": rounds,
        "machine": machine(),
    }


def read(file: Path, use: Callable[[bytes], object]) -> None:
    with open(file, "rb", buffering=0) as stream:
        while chunk := stream.read(CHUNK):
            use(chunk)


def healthy(split_dir: Path, manifest: Manifest, workers: int) -> None:
    found = verify_files(split_dir, manifest, None, workers)
    assert not found.problems and found.samples == manifest.samples, found.problems[:3]


def timed(run: Callable[[], object], size: int) -> dict[str, float]:
    """Bytes per second by the clock, and by the CPU time of this process and of those that it started."""
    before, started = os.times(), time.perf_counter()
    run()
    wall, after = time.perf_counter() - started, os.times()
    return {"bytes_per_second": size / wall, "bytes_per_cpu_second": size / max(1e-3, sum(after[:4]) - sum(before[:4]))}


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "openssl": __import__("ssl").OPENSSL_VERSION,
    }


def as_markdown(result: dict[str, Any]) -> str:
    rounds, about = result["rounds"], result["machine"]
    lines = [
        f"{result['bytes'] / 2**20:.0f} MiB, {result['samples']} samples in {result['shards']} shards; "
        f"{about['cores']} x {about['cpu']}, Python {about['python']}, load {about['load_average']:.1f}",
        "",
        "| way | MiB/s | ratio to sha256sum | MiB per second of CPU | ratio to sha256sum | ratio to hashlib |",
        "|---|---|---|---|---|---|",
    ]
    for name in ("read", "hashlib", "sha256sum", "doctor", "doctor, 2 workers"):
        cells = [name]
        for unit, against in (("bytes_per_second", ["sha256sum"]), ("bytes_per_cpu_second", ["sha256sum", "hashlib"])):
            cells.append(f"{statistics.median(one[name][unit] for one in rounds) / 2**20:.0f}")
            for other in against:
                ratios = [one[name][unit] / one[other][unit] for one in rounds]
                cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
