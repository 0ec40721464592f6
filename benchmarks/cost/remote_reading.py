"""What training from an object store costs against a local disk: nothing is copied yet, and everything is.

    python -m benchmarks.cost.remote_reading --output benchmarks/results/remote_reading.json

The store is a web server on this machine, in a process of its own, that waits before each answer. The loader is that
of training. Rounds hold all ways of reading in turn; a ratio is of two runs of one round.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cost.loading import machine, train_tokenizer
from benchmarks.cost.opening import data_prep
from benchmarks.cost.reading import MICRO_BATCH, our_batches
from data_prep.stores import read_ahead
from data_prep.stores.address import Address
from data_prep.stores.kept_files import own_folder
from model.plans.flm import FLMPlanner
from pipeline.data.order import SampleOrder
from pipeline.data.shard_reader import Corpus, open_corpora
from pipeline.data.tokenizer import TextTokenizer
from pipeline.staging import node_folder
from pipeline.staging.node_folder import READY, name_of
from pipeline.staging.plan import ReadsAhead
from pipeline.staging.stager import Stager
from tests import range_server

WAYS = ("local disk", "store, copies on the node", "store, read ahead", "store, one request after the other")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tempfile.tempdir = scratch
        node_folder.SPARE_BYTES = 0
        sizes = ["--train", arguments.samples, "--dev", 0, "--test", 0, "--image-size", arguments.image_px]
        data_prep(
            "synth",
            "--output",
            folder / "www" / "synth",
            *sizes,
            "--samples-per-shard",
            100,
            "--pair-share",
            0,
            folder=folder,
        )
        tokenizer = train_tokenizer(open_corpora([folder / "www"], "train"))
        with slow_server(folder / "www", arguments.latency_ms / 1000) as url:
            rounds = [one_round(folder, url, tokenizer, arguments.workers) for _ in range(arguments.repeats)]
    result: dict[str, Any] = {"samples": arguments.samples, "latency_ms": arguments.latency_ms, "rounds": rounds}
    result["command"] = " ".join(
        ["python -m benchmarks.cost.remote_reading", *(argv if argv is not None else sys.argv[1:])]
    )
    result["machine"] = machine()
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")
    print(as_markdown(result))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--image-px", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--latency-ms", type=float, default=20.0, help="before each answer of the server")
    parser.add_argument("--output", help="JSON file")
    return parser.parse_args(argv)


@contextmanager
def slow_server(folder: Path, seconds: float) -> Iterator[str]:
    """The address of a web server that waits before each answer."""
    answer = range_server._Handler._answer

    def late(handler: Any, has_body: bool) -> None:
        time.sleep(seconds)
        answer(handler, has_body)

    with range_server.RangeServer(folder) as server:
        pid = os.fork()
        if pid == 0:
            range_server._Handler._answer = late
            try:
                server.serve_forever()
            finally:
                os._exit(0)
        server.socket.close()
        try:
            yield server.url
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def one_round(folder: Path, url: str, tokenizer: TextTokenizer, workers: int) -> dict[str, float]:
    """Samples per second of an epoch, by each way of reading."""
    here, there = folder / "www" / "synth" / "train", Address(f"{url}/synth/train")
    found = {WAYS[0]: speed(Corpus(here), tokenizer, workers)}
    copied = Corpus(there)
    copy_all(copied, folder)
    found[WAYS[1]] = speed(copied, tokenizer, workers)
    found[WAYS[2]] = speed(Corpus(there), tokenizer, workers)
    held, read_ahead.HELD = read_ahead.HELD, 0
    found[WAYS[3]] = speed(Corpus(there), tokenizer, workers)
    read_ahead.HELD = held
    return found


def copy_all(corpus: Corpus, folder: Path) -> None:
    """Copy every shard to the node, as staging does, and let the corpus read the copies."""
    samples = [corpus.manifest.shards.rows]
    ahead = ReadsAhead(SampleOrder([len(corpus)], 0), samples, [0], 1, len(corpus), 1, 1)
    (folder / "disk").mkdir(exist_ok=True)
    base = own_folder(folder / "disk")
    stager = Stager(base, [corpus], ahead, np.concatenate(samples), 2**40)
    stager.take_folders()
    while (move := stager._next_move()) is not None:
        stager._carry_out(move)
    stager.close()
    corpus.read_copies_in(base / name_of(corpus.manifest) / READY)


def speed(corpus: Corpus, tokenizer: TextTokenizer, workers: int) -> float:
    """Samples per second of one epoch after its first batch."""
    planner, order = FLMPlanner(tokenizer.vocabulary, 0.3, negative_share=0.0), SampleOrder([len(corpus)], 0)
    arguments = argparse.Namespace(workers=workers, image_size=224)
    batches = iter(our_batches([corpus], order, planner, tokenizer, len(corpus) // MICRO_BATCH, arguments))
    next(batches)
    began, count = time.perf_counter(), 0
    for batch in batches:
        count += len(batch.keys)
    return count / (time.perf_counter() - began)


def as_markdown(result: dict[str, Any]) -> str:
    lines = ["| way of reading | samples/s | ratio to the local disk |", "|---|---|---|"]
    for way in WAYS:
        speeds = [one[way] for one in result["rounds"]]
        ratios = [one[way] / one[WAYS[0]] for one in result["rounds"]]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})"
        lines.append(f"| {way} | {statistics.median(speeds):.0f} | {spread} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
