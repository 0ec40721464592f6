"""What reading at random costs: our loader against webdataset's own sequential pipeline on the same shards.

    python -m data_prep synth --output data/reading --train 16000 --dev 0 --test 0 --pair-share 0 --image-size 256
    python -m benchmarks.cost.reading --data data/reading --output benchmarks/results/reading.json

Both decode, resize and tokenise with the same functions in the same number of processes, and both make the same kind
of batch. Runs alternate, a ratio is of two runs of one round. CPU time is that of all processes together: unlike the
rate it hardly depends on what else the machine does. Without --data the corpus is made for the occasion.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset

from benchmarks.cost.loading import machine, rate, train_tokenizer
from benchmarks.cost.opening import data_prep
from model.batch import Batch, Row
from model.plans.flm import FLMPlanner
from pipeline.data.order import SampleOrder
from pipeline.data.shard_reader import Corpus, open_corpora
from pipeline.data.tokenizer import TextTokenizer, clean_caption
from pipeline.data.transforms import clip_transform, decode_image, draft_size
from pipeline.loading.collate import Item, collate
from pipeline.loading.datasets import Preparation
from pipeline.loading.loader import LoaderOptions, build_train_loader
from pipeline.tasks.caption_rows import CaptionRows

MICRO_BATCH, MAX_TEXT_LENGTH, PREFETCH = 64, 50, 4
JUMP_ROWS, JUMP_SHARDS, JUMP_PROCESSES, JUMP_SAMPLES = 10_000_000, 1000, 8, 65_536
SHUFFLES = {"full": {}, "blocks": {"shuffle": "blocks"}, "sequential": {"shuffle": "none"}}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(arguments.data or scratch)
        if not arguments.data:
            sizes = ["--train", arguments.synthetic, "--dev", 0, "--test", 0, "--image-size", arguments.image_px]
            sizes += ["--samples-per-shard", 500, "--pair-share", 0]
            data_prep("synth", "--output", folder / "synth", *sizes, folder=folder)
        corpora = open_corpora([folder], "train")
        result = measure(corpora, arguments)
    result["command"] = "python -m benchmarks.cost.reading " + " ".join(argv if argv is not None else sys.argv[1:])
    result["machine"] = machine() | {"webdataset": webdataset.__version__}
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")
    print(as_markdown(result))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost.reading", description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="prepared corpus or root (default: one is made)")
    parser.add_argument("--synthetic", type=int, default=16_000, metavar="N", help="images to make (default 16000)")
    parser.add_argument("--image-px", type=int, default=256, help="their size (default 256)")
    parser.add_argument("--image-size", type=int, default=224, help="model resolution (default 224)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7, help="rounds, in alternating order (default 7)")
    parser.add_argument("--output", help="write the figures as JSON here")
    return parser.parse_args(argv)


def measure(corpora: list[Corpus], arguments: argparse.Namespace) -> dict[str, Any]:
    """Samples per second of each way of reading in every round, and the jumps of each order."""
    tokenizer = train_tokenizer(corpora)
    planner = FLMPlanner(
        tokenizer.vocabulary, 0.4, negative_share=0.0
    )  # a negative is one more read: not compared here
    work = partial(Work, tokenizer, planner, arguments.image_size)
    files = [str(corpus.split_dir / shard.file) for corpus in corpora for shard in corpus.manifest.shards]
    steps = sum(map(len, corpora)) // MICRO_BATCH
    runs: dict[str, Callable[[], dict[str, float]]] = {
        "webdataset": partial(timed, partial(webdataset_batches, files, work, arguments.workers))
    }
    for name in ("full", "blocks"):
        order = SampleOrder([len(corpus) for corpus in corpora], 0, **SHUFFLES[name])
        runs[name] = partial(timed, partial(our_batches, corpora, order, planner, tokenizer, steps, arguments))
    for run in runs.values():
        run()  # the files are in the page cache and every page of the libraries is touched
    rounds = []
    for repeat in range(arguments.repeats):
        names = list(runs) if repeat % 2 else list(reversed(runs))
        rounds.append({name: runs[name]() for name in names})
    return {
        "rows": sum(map(len, corpora)),
        "shards": len(files),
        "mean_sample_bytes": sum(os.path.getsize(file) for file in files) / sum(map(len, corpora)),
        "image_size": arguments.image_size,
        "workers": arguments.workers,
        "rounds": rounds,
        "jumps": {name: jumps(SampleOrder([JUMP_ROWS], 0, **options)) for name, options in SHUFFLES.items()},
    }


def timed(batches: Callable[[], Iterable[Batch]]) -> dict[str, float]:
    """Samples per second from the first batch to the last, and CPU milliseconds per sample of all processes."""
    before = cpu_seconds()
    counts: list[int] = []
    per_second = rate(counts.append(len(batch.keys)) or len(batch.keys) for batch in batches())
    gc.collect()  # so that the processes are gone and accounted for
    return {"samples_per_second": per_second, "cpu_ms": (cpu_seconds() - before) * 1000 / sum(counts)}


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def our_batches(
    corpora: list[Corpus],
    order: SampleOrder,
    planner: FLMPlanner,
    tokenizer: TextTokenizer,
    steps: int,
    arguments: argparse.Namespace,
) -> Iterable[Batch]:
    """One epoch through our loader."""
    options = LoaderOptions(num_workers=arguments.workers, prefetch=PREFETCH, fast_decode=True)
    preparation = Preparation(CaptionRows(tokenizer, MAX_TEXT_LENGTH), planner, arguments.image_size)
    place = dict(
        micro_batch=MICRO_BATCH, accumulation=1, rank=0, world=1, start_step=0, num_steps=steps, seed=0, options=options
    )
    return build_train_loader(corpora, order, preparation, **place)


class Work:
    """What webdataset's processes do with their samples: batches of the same kind by the same functions."""

    def __init__(self, tokenizer: TextTokenizer, planner: FLMPlanner, image_size: int) -> None:
        self._tokenizer, self._planner, self._size = tokenizer, planner, image_size
        self._transform, self._draft = clip_transform(image_size, fast=True), draft_size(image_size, True)

    def __call__(self, samples: Iterator[dict[str, Any]]) -> Iterator[Batch]:
        items: list[Item] = []
        for sample in samples:
            if not items:
                images = torch.empty((MICRO_BATCH, 1, 3, self._size, self._size), dtype=torch.uint8)
            self._transform(decode_image(sample["jpg"], draft_size=self._draft), images[len(items), 0])
            caption = json.loads(sample["json"])["captions"][0]
            words = self._tokenizer.encode(clean_caption(caption, False), MAX_TEXT_LENGTH)
            items.append(Item(sample["__key__"], [Row(words, 0, seed=len(items))]))
            if len(items) == MICRO_BATCH:
                yield collate(items, images, self._planner)
                items = []


def webdataset_batches(files: list[str], work: Callable[[], Work], workers: int) -> Iterable[Batch]:
    """One pass through webdataset, shard by shard and member by member."""
    split = webdataset.split_by_worker
    pipeline = webdataset.DataPipeline(
        webdataset.SimpleShardList(files), split, webdataset.tarfile_to_samples(), work()
    )
    return webdataset.WebLoader(pipeline, batch_size=None, num_workers=workers, prefetch_factor=PREFETCH)


def jumps(order: SampleOrder) -> dict[str, float]:
    """Where 8 processes, as of 4 ranks with 2 workers each, read in 10 million rows of 1,000 shards.

    A process reads every eighth micro-batch, in the order of the shards; its distances are between successive reads in
    one shard. What the disk sees of all 8 are the distinct shards and the blocks of 1024 rows among 1,000 samples.
    """
    rows_per_shard = JUMP_ROWS // JUMP_SHARDS
    rows = order.at_many(np.arange(JUMP_SAMPLES))[1].reshape(-1, MICRO_BATCH)
    mine = np.sort(rows[::JUMP_PROCESSES], axis=1).ravel()
    switches = np.diff(mine // rows_per_shard) != 0
    inside = np.abs(np.diff(mine))[~switches]
    thousands = rows.ravel()[: JUMP_SAMPLES // 1000 * 1000].reshape(-1, 1000)
    return {
        "shard_switches_per_1000": float(switches.mean() * 1000),
        "median_rows_between_reads_in_a_shard": float(np.median(inside)) if len(inside) else float("nan"),
        "distinct_shards_per_1000": float(np.mean([len(set(part // rows_per_shard)) for part in thousands])),
        "distinct_blocks_per_window": float(len(set((rows.ravel()[: 32 * 1024] // 1024).tolist()))),
    }


def as_markdown(result: dict[str, Any]) -> str:
    cpu, rounds = result["machine"], result["rounds"]
    lines = [
        f"{result['rows']} samples of {result['mean_sample_bytes'] / 1024:.0f} KiB in {result['shards']} shards to "
        f"{result['image_size']} px, {result['workers']} workers; {cpu['cores']} x {cpu['cpu']}, load "
        f"{cpu['load_average']:.0f}, webdataset {cpu['webdataset']}, torch {cpu['torch']}",
        "",
        "| way of reading | samples/s | ratio to webdataset | CPU ms per sample | ratio to webdataset |",
        "|---|---|---|---|---|",
    ]
    for name in ("webdataset", "full", "blocks"):
        cells = [name]
        for key, digits in (("samples_per_second", 0), ("cpu_ms", 2)):
            ratios = [one[name][key] / one["webdataset"][key] for one in rounds]
            cells.append(f"{statistics.median(one[name][key] for one in rounds):.{digits}f}")
            cells.append(f"{statistics.median(ratios):.3f} ({min(ratios):.3f}, {max(ratios):.3f})")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| order | shard switches per 1,000 | rows between reads in a shard | shards per 1,000 | blocks |"]
    lines += ["|---|---|---|---|---|"]
    for name, found in result["jumps"].items():
        lines.append(f"| {name} | {' | '.join(f'{value:.0f}' for value in found.values())} |")
    return "\n".join([*lines, "", f"`{result['command']}`"])


if __name__ == "__main__":
    raise SystemExit(main())
