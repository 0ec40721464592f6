"""Rehearses the opening of data by many ranks: what each asks of the file system, and how long it takes.

    python -m benchmarks.proof.start_rehearsal --ranks 512 --shards 100000

The shards are sparse files in a temporary folder, their index files as well, so that a corpus of terabytes costs a few
hundred MB of disk. The ranks are simulated one after the other in this process by the code that training runs
(``open_training_data``), with a stand-in for the collectives: what rank 0 sends to all is pickled once and unpickled by
each rank. ``--latency-ms`` lets each call that asks for a file wait so long, as on a network file system.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cost.loading import machine
from data_prep.drawn.synth import SynthOptions, write_corpora
from data_prep.manifest import Manifest, Shard, index_columns, write_manifest
from data_prep.tokenizer import train_tokenizer
from pipeline.config.options import Config
from pipeline.data.order import micro_batch_positions
from pipeline.data.transforms import UnusableSample
from pipeline.loading.open_data import TrainingData, open_training_data, sample_order

FIELDS = ("image", "text", "meta")
TAR_BYTES = 512 * 2**20  # of a shard, all of it a hole
ASKS = ("lstat", "stat", "open", "scandir", "listdir")  # of os; all take a path, all may go to a server
MIB = 2**20


class SimulatedRank:
    """In place of ``Agreement``: rank ``rank`` of ``world_size``, of which rank 0 has run before all others."""

    alone = False

    def __init__(self, rank: int, world_size: int, sent: list[bytes]) -> None:
        self.rank, self.world_size, self.is_main, self._sent = rank, world_size, rank == 0, sent

    def from_main(self, value: Any) -> Any:
        if self.is_main:
            self._sent[:] = [pickle.dumps(value)]
            return value
        return pickle.loads(self._sent[0])

    def gather(self, value: Any) -> list[Any]:
        return [value]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        began = time.perf_counter()
        config = make(Path(scratch), arguments.shards, arguments.rows)
        made = time.perf_counter() - began
        open_training_data(config)  # imports what a tokenizer needs
        sent: list[bytes] = []
        ranks = [rehearse(config, SimulatedRank(rank, arguments.ranks, sent)) for rank in range(arguments.ranks)]
        late = [
            rehearse(config, SimulatedRank(rank, arguments.ranks, sent), arguments.latency_ms)
            for rank in sorted({0, arguments.ranks // 2, arguments.ranks - 1})
        ]
        alone = rehearse(config, SimulatedRank(0, 1, []), arguments.latency_ms)
        reading = {shuffle: first_steps(config, shuffle, arguments) for shuffle in ("blocks", "full")}
    given = argv if argv is not None else sys.argv[1:]
    result = {
        "command": " ".join(["python -m benchmarks.proof.start_rehearsal", *given]),
        "machine": machine(),
        "made_s": made,
        "shards": arguments.shards,
        "rows_per_shard": arguments.rows,
        "latency_ms": arguments.latency_ms,
        "sent_bytes": len(sent[0]),
        "ranks": ranks,
        "late": late,
        "alone": alone,
        "reading": reading,
    }
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")
    print(as_markdown(result))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.proof.start_rehearsal", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--ranks", type=int, default=512)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=10_000, help="rows of each shard (default 10000)")
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20, help="steps of rank 0 of which shard opens are counted")
    parser.add_argument("--latency-ms", type=float, default=1.0, help="of each call in the second pass (default 1)")
    parser.add_argument("--folder", help="where the files are made for a while (default: the system's)")
    parser.add_argument("--output", help="write the figures as JSON here")
    return parser.parse_args(argv)


def make(folder: Path, num_shards: int, rows: int) -> Config:
    """A corpus of sparse shards, a tokenizer, and the configuration of a run on them."""
    write_corpora(folder / "scenes", SynthOptions({"train": 20, "dev": 0, "test": 0}, image_size=32, pair_share=0))
    train_tokenizer([folder / "scenes" / "train"], folder / "tokenizer", 300)
    split = folder / "corpus" / "train"
    split.mkdir(parents=True)
    width = index_columns(FIELDS).width
    np.lib.format.open_memmap(split / "head", "w+", np.int64, (rows, width)).flush()
    head = (split / "head").read_bytes()[:128]
    (split / "head").unlink()
    shards = []
    for number in range(num_shards):
        names = f"{number:05d}.tar", f"{number:05d}.index.npy"
        for name, content, size in ((names[0], b"", TAR_BYTES), (names[1], head, len(head) + rows * width * 8)):
            with open(split / name, "wb") as stream:
                stream.write(content)
                stream.truncate(size)
        hashes = (hashlib.sha256(name.encode()).hexdigest() for name in names)
        shards.append(Shard(*names, rows, rows, TAR_BYTES, *hashes))
    write_manifest(split, Manifest("corpus", "train", FIELDS, shards))
    config = Config()
    config.data.paths, config.data.tokenizer = [str(folder / "corpus")], str(folder / "tokenizer")
    config.data.eval_split = None
    config.optim.batch_size = min(config.optim.batch_size, num_shards * rows)
    return config


@contextmanager
def counted(latency_ms: float = 0.0) -> Iterator[Counter[str]]:
    """Counts calls of ASKS, those about ``shard_files`` also, and ``bytes`` read; a call takes ``latency_ms``."""
    counts, lock = Counter(), threading.Lock()
    originals = {name: getattr(os, name) for name in ASKS}

    def wrapped(name: str):
        def ask(*arguments, **options):
            with lock:
                counts[name] += 1
                counts["shard_files"] += str(arguments[0]).endswith((".tar", ".npy"))
            if latency_ms:
                time.sleep(latency_ms / 1000)
            return originals[name](*arguments, **options)

        return ask

    before = read_by_this_process()
    for name in ASKS:
        setattr(os, name, wrapped(name))
    try:
        yield counts
    finally:
        for name, original in originals.items():
            setattr(os, name, original)
        counts["bytes"] = read_by_this_process() - before


def read_by_this_process() -> int:
    """Bytes that this process has asked files for so far, cached or not."""
    return int(Path("/proc/self/io").read_text().split()[1])


def rehearse(config: Config, rank: SimulatedRank, latency_ms: float = 0.0) -> dict[str, float]:
    """Calls, bytes and seconds of one rank until its data is open."""
    zeros = dict.fromkeys((*ASKS, "shard_files"), 0)
    with counted(latency_ms) as counts:
        began = time.perf_counter()
        data = open_training_data(config, 1, rank)
        seconds = time.perf_counter() - began
    began = time.perf_counter()
    if rank.rank in (0, 1):
        data.corpora[0].fingerprint  # noqa: B018  every rank computes it
    return {"rank": rank.rank, "seconds": seconds, "fingerprint_s": time.perf_counter() - began, **zeros, **counts}


def first_steps(config: Config, shuffle: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Opens of shards per sample over the first steps of rank 0; the samples are holes, nothing is decoded."""
    config.data.shuffle = shuffle
    data: TrainingData = open_training_data(config, 1, SimulatedRank(0, 1, []))
    order, (corpus,) = sample_order(config, data), data.corpora
    samples = 0
    with counted() as counts:
        for step in range(arguments.steps):
            positions = micro_batch_positions(step, 0, 0, arguments.ranks, arguments.micro_batch, 1)
            _, rows, _ = order.at_many(positions)
            for row in sorted(rows.tolist()):
                samples += 1
                try:
                    corpus.read(row)
                except UnusableSample:
                    continue
    corpus.close()
    return {"samples": samples, "opens_per_sample": counts["open"] / samples}


def as_markdown(result: dict[str, Any]) -> str:
    cpu, ranks = result["machine"], result["ranks"]
    asked = [sum(rank.get(name, 0) for name in ASKS) for rank in ranks]
    late = {rank["rank"]: rank["seconds"] for rank in result["late"]}
    sent = result["sent_bytes"] / MIB
    lines = [
        f"{result['shards']:,} shards of {result['rows_per_shard']:,} rows, {len(ranks)} ranks; {cpu['cores']} x "
        f"{cpu['cpu']}, Python {cpu['python']}, torch {cpu['torch']}, load {cpu['load_average']:.0f}",
        "",
        "| until the data is open | rank 0 | the busiest other rank | all ranks | one rank alone |",
        "|---|---|---|---|---|",
    ]

    def row(name: str, values: list[float], alone: float, form: str) -> None:
        cells = [values[0], max(values[1:], default=0), sum(values), alone]
        lines.append(f"| {name} | {' | '.join(format(value, form) for value in cells)} |")

    alone = result["alone"]
    row("calls that ask for a file", asked, sum(alone.get(name, 0) for name in ASKS), ",")
    row("of them about shards", [rank["shard_files"] for rank in ranks], alone["shard_files"], ",")
    row("MiB read from files", [rank["bytes"] / MIB for rank in ranks], alone["bytes"] / MIB, ",.2f")
    received = [0.0, *[sent] * (len(ranks) - 1)]
    row("MiB received from rank 0", received, 0.0, ",.1f")
    fingerprint = max(rank["fingerprint_s"] for rank in ranks)
    others = max((rank["seconds"] for rank in ranks[1:]), default=0)
    lines.append(f"| seconds, local disk | {ranks[0]['seconds']:.2f} | {others:.2f} | | |")
    late_others = max((seconds for rank, seconds in late.items() if rank), default=0)
    name = f"seconds, {result['latency_ms']:g} ms a call"
    lines.append(f"| {name} | {late[0]:.2f} | {late_others:.2f} | | {alone['seconds']:.2f} |")
    opens = ", ".join(f"`{name}` {found['opens_per_sample']:.2f}" for name, found in result["reading"].items())
    lines += [
        "",
        f"Each rank then hashes the table for the run's fingerprint, {fingerprint:.2f} s. Opens of files per sample in "
        f"the first {result['reading']['full']['samples']:,} samples of a rank, by `data.shuffle`: {opens}.",
        "",
        f"`{result['command']}`",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
