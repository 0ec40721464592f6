"""What copying shards to a disk of the node saves where the data lies behind a slow network, and what it costs.

    python -m benchmarks.cost.staging --output benchmarks/results/staging.json

The network is simulated in the processes that read: every call that opens or reads a file of the corpus waits for a
latency, and for its bytes at a rate of its own stream. The loader and the copying are those of training. Runs of a
round follow each other; a ratio is of two runs of one round, so that what else the machine does weighs less.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cost.loading import machine, train_tokenizer
from benchmarks.cost.opening import data_prep
from benchmarks.cost.reading import MICRO_BATCH, SHUFFLES, our_batches
from data_prep.stores.kept_files import own_folder
from model.plans.flm import FLMPlanner
from pipeline.data.order import SampleOrder
from pipeline.data.shard_reader import Corpus, open_corpora
from pipeline.data.tokenizer import TextTokenizer
from pipeline.staging import node_folder, plan
from pipeline.staging.node_folder import READY, name_of
from pipeline.staging.plan import ReadsAhead
from pipeline.staging.stager import Stager

EPOCHS = 2
MIB = 2**20


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sizes = ["--train", arguments.samples, "--dev", 0, "--test", 0, "--image-size", arguments.image_px]
        sizes += ["--samples-per-shard", arguments.shard_samples, "--pair-share", 0]
        data_prep("synth", "--output", folder / "synth", *sizes, folder=folder)
        result = measure(folder, arguments)
    result["command"] = " ".join(["python -m benchmarks.cost.staging", *(argv if argv is not None else sys.argv[1:])])
    result["machine"] = machine()
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")
    print(as_markdown(result))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost.staging", description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=2048, help="images to make (default 2048)")
    parser.add_argument("--shard-samples", type=int, default=64, help="of each shard (default 64)")
    parser.add_argument("--image-px", type=int, default=256, help="their size (default 256)")
    parser.add_argument("--image-size", type=int, default=224, help="model resolution (default 224)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--latency-ms", type=float, default=5.0, help="of each call (default 5)")
    parser.add_argument("--stream-mib", type=float, default=200.0, help="MiB/s of one stream (default 200)")
    parser.add_argument("--room", type=float, default=0.5, help="share of the corpus, in the smaller of two rooms")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--output", help="write the figures as JSON here")
    return parser.parse_args(argv)


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Samples per second and MiB over the network in each epoch of each way, in every round."""
    tokenizer = train_tokenizer(open_corpora([folder], "train"))
    rooms = {"network": None, "all copied": 1.0, f"room for {arguments.room:.0%}": arguments.room}
    node_folder.SPARE_BYTES = 0
    plan.STRETCH_SAMPLES = 4 * MICRO_BATCH  # a corpus that is read within minutes; a real one looks further ahead
    rounds = []
    for _ in range(arguments.repeats):
        rounds.append({})
        for shuffle in ("full", "blocks"):
            for name, room in rooms.items():
                with tempfile.TemporaryDirectory() as disk, Network(folder, arguments) as network:
                    found = one_run(folder, Path(disk), network, shuffle, room, tokenizer, arguments)
                rounds[-1][f"{shuffle}, {name}"] = found
        rounds[-1]["full, local disk"] = one_run(folder, None, None, "full", None, tokenizer, arguments)
    shards = sum(len(corpus.manifest.shards) for corpus in open_corpora([folder], "train"))
    return {"settings": vars(arguments), "shards": shards, "rounds": rounds}


def one_run(
    folder: Path,
    disk: Path | None,
    network: Network | None,
    shuffle: str,
    room: float | None,
    tokenizer: TextTokenizer,
    arguments: argparse.Namespace,
) -> list[dict[str, float]]:
    """Each epoch of a run whose copies may take ``room`` times the size of the corpus (None: no copies)."""
    corpora = open_corpora([folder], "train")
    samples = [corpus.manifest.shards.rows for corpus in corpora]
    blocks = dict(block_rows=arguments.shard_samples, window_blocks=4) if shuffle == "blocks" else {}
    order = SampleOrder([len(corpus) for corpus in corpora], 0, **SHUFFLES[shuffle], **blocks)
    steps = sum(map(len, corpora)) // MICRO_BATCH
    planner = FLMPlanner(tokenizer.vocabulary, 0.4, negative_share=0.0)
    stager = None
    if room is not None:
        ahead = ReadsAhead(order, samples, [0], 1, MICRO_BATCH, 1, EPOCHS * steps)
        stager = staging(disk, corpora, ahead, room)
    before, epochs = network.bytes if network else 0, []
    batches = iter(our_batches(corpora, order, planner, tokenizer, EPOCHS * steps, arguments))
    for epoch in range(EPOCHS):
        began, count = time.perf_counter(), 0
        for step in range(epoch * steps, (epoch + 1) * steps):
            count += len(next(batches).keys)
            if stager is not None:
                stager.follow(step + 1)
        seconds, now = time.perf_counter() - began, network.bytes if network else 0
        epochs.append({"samples_per_second": count / seconds, "network_mib": (now - before) / MIB})
        before = now
    batches.close()
    if stager is not None:
        stager.close()
    gc.collect()
    return epochs


def staging(disk: Path, corpora: list[Corpus], ahead: ReadsAhead, room: float) -> Stager:
    """A stager at work, from whose copies the corpora read."""
    samples = np.concatenate([corpus.manifest.shards.rows for corpus in corpora])
    folders = [own_folder(disk) / name_of(corpus.manifest) / READY for corpus in corpora]
    total = sum(node_folder.NodeFolder(disk, one.split_dir, one.manifest).sizes.sum() for one in corpora)
    stager = Stager(own_folder(disk), corpora, ahead, samples, int(total * room))
    stager.take_folders()
    for corpus, copies in zip(corpora, folders):
        corpus.read_copies_in(copies)
    stager.start(0)
    return stager


class Network:
    """While entered, calls of ``os`` about files below ``folder`` are slow in this process and those it forks."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        self._folder, self._latency = str(folder), arguments.latency_ms / 1000
        self._stream = arguments.stream_mib * MIB
        self._count = multiprocessing.Value("q", 0)
        self._remote: set[int] = set()
        self._originals = os.open, os.pread, os.close

    @property
    def bytes(self) -> int:
        """Read over the network so far, by all processes."""
        return self._count.value

    def __enter__(self) -> Network:
        os.open, os.pread, os.close = self._open, self._pread, self._close
        return self

    def __exit__(self, *error: object) -> None:
        os.open, os.pread, os.close = self._originals

    def _open(self, path: Any, *arguments: Any, **options: Any) -> int:
        descriptor = self._originals[0](path, *arguments, **options)
        if str(path).startswith(self._folder):
            time.sleep(self._latency)
            self._remote.add(descriptor)
        return descriptor

    def _pread(self, descriptor: int, size: int, offset: int) -> bytes:
        data = self._originals[1](descriptor, size, offset)
        if descriptor in self._remote:
            time.sleep(self._latency + len(data) / self._stream)
            with self._count.get_lock():
                self._count.value += len(data)
        return data

    def _close(self, descriptor: int) -> None:
        self._remote.discard(descriptor)
        self._originals[2](descriptor)


def as_markdown(result: dict[str, Any]) -> str:
    cpu, rounds, settings = result["machine"], result["rounds"], result["settings"]
    lines = [
        f"{settings['samples']} samples in {result['shards']} shards, {settings['workers']} loader processes, "
        f"{settings['latency_ms']:g} ms a call and {settings['stream_mib']:g} MiB/s a stream; {cpu['cores']} x "
        f"{cpu['cpu']}, load {cpu['load_average']:.0f}, Python {cpu['python']}, torch {cpu['torch']}",
        "",
        "| order, way | samples/s, epoch 1 | ratio to network | epoch 2 | ratio | MiB over the network | epoch 2 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in rounds[0]:
        cells = [name]
        for epoch in range(EPOCHS):
            found = [one[name][epoch]["samples_per_second"] for one in rounds]
            network = [one[f"{name.partition(',')[0]}, network"][epoch]["samples_per_second"] for one in rounds]
            ratios = [own / other for own, other in zip(found, network)]
            cells.append(f"{statistics.median(found):.0f}")
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})")
        for epoch in range(EPOCHS):
            cells.append(f"{statistics.median(one[name][epoch]['network_mib'] for one in rounds):.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"`{result['command']}`"])


if __name__ == "__main__":
    raise SystemExit(main())
