"""How long until the first batch, and how much memory: 10 million samples in 1,000 shards, at step 0 and far on.

    python -m benchmarks.cost.opening --output benchmarks/results/opening.json

One shard of 10,000 rows is made by ``data_prep synth`` and stands in the folder under a thousand names (hard links), as
does its index; the manifest lists all of them. Each measurement is a process of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
SAMPLES, CAPTIONS = 2000, 5  # of the one shard
MIB = 2**20


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.child:
        print(json.dumps(first_batch(Path(arguments.folder), arguments.step, arguments.workers)))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(arguments.folder or scratch)
        rows = make(folder, arguments.shards)
        runs = {
            str(step): [measure(folder, step, arguments.workers) for _ in range(arguments.repeats)]
            for step in arguments.steps
        }
    from benchmarks.cost.loading import machine

    given = argv if argv is not None else sys.argv[1:]
    result = {"command": " ".join(["python -m benchmarks.cost.opening", *given]), "machine": machine(), "rows": rows}
    result |= {"shards": arguments.shards, "workers": arguments.workers, "steps": runs}
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")
    print(as_markdown(result))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost.opening", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", help="where the corpus is made, or stands already (default: a temporary folder)")
    parser.add_argument("--shards", type=int, default=1000, help="shards of 10,000 rows (default 1000)")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 1_000_000], help="steps to begin at")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", help="write the figures as JSON here")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--step", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def make(folder: Path, num_shards: int) -> int:
    """The corpus, unless it stands there; returns its number of rows."""
    from data_prep.manifest import read_manifest, write_manifest

    split = folder / "synth" / "train"
    folder.mkdir(parents=True, exist_ok=True)
    if not (split / "manifest.json").exists():
        sizes = ["--train", SAMPLES, "--dev", 0, "--test", 0, "--captions-per-image", CAPTIONS, "--image-size", 128]
        data_prep("synth", "--output", folder / "synth", *sizes, "--pair-share", 0, folder=folder)
        data_prep("tokenizer", "--data", folder / "synth", "--output", folder / "tokenizer", folder=folder)
    manifest = read_manifest(split)
    one = manifest.shards[0]
    shards = []
    for number in range(num_shards):
        shard = dataclasses.replace(one, file=f"{number:05d}.tar", index_file=f"{number:05d}.index.npy")
        for old, new in ((one.file, shard.file), (one.index_file, shard.index_file)):
            if not (split / new).exists():
                os.link(split / old, split / new)
        shards.append(shard)
    manifest = dataclasses.replace(manifest, shards=tuple(shards))
    write_manifest(split, manifest)
    return manifest.rows


def data_prep(*words: object, folder: Path) -> None:
    command = [sys.executable, "-m", "data_prep", *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)


def measure(folder: Path, step: int, workers: int) -> dict[str, float]:
    """One process from its start to its first batch."""
    command = [sys.executable, "-m", "benchmarks.cost.opening", "--child", "--folder", str(folder)]
    began = time.time()
    done = subprocess.run(
        [*command, "--step", str(step), "--workers", str(workers)],
        cwd=REPOSITORY,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])  # importing DeepSpeed may say something
    return {"from_process_start_s": found.pop("ready_at") - began, **found}


def first_batch(folder: Path, step: int, workers: int) -> dict[str, float]:
    """Open the data as a rank of training does and wait for the first micro-batch of ``step``."""
    began = time.perf_counter()
    import torch
    import transformers.models.auto.tokenization_auto  # noqa: F401  what load_tokenizer imports

    from model.plans.flm import FLMPlanner
    from pipeline.config.options import Config
    from pipeline.distributed.places import Place
    from pipeline.loading.datasets import Preparation
    from pipeline.loading.open_data import TrainingBatches, open_training_data
    from pipeline.tasks.caption_rows import CaptionRows

    torch.set_num_threads(1)
    imported, memory_before, before_s = time.perf_counter(), rss_mib(os.getpid()), cpu_seconds(os.getpid())
    config = Config()
    config.data.paths, config.data.num_workers, config.train.steps = [str(folder / "synth")], workers, step + 10
    data = open_training_data(config)
    opened = time.perf_counter()
    planner = FLMPlanner(data.tokenizer.vocabulary, 0.4, negative_share=config.objective.negative_share)
    maker = CaptionRows(data.tokenizer, config.data.max_text_length, config.objective.negative_share)
    preparation = Preparation(maker, planner, config.model.vision.image_size)
    loader = TrainingBatches(config, data, preparation, Place(0, 1, 0, "single"), 64, pin=False)
    children_before = children_of_this_process()
    batches = loader.start(step)
    batch = next(batches)
    ready, ready_at = time.perf_counter(), time.time()
    assert len(batch.keys) == 64 and not batch.problems
    loader_workers = children_of_this_process() - children_before
    used = [cpu_seconds(os.getpid()) - before_s, *map(cpu_seconds, loader_workers)]
    pss = pss_mib(os.getpid()) + sum(map(pss_mib, loader_workers))
    result = {
        "ready_at": ready_at,
        "imports_s": imported - began,
        "opening_s": opened - imported,
        "first_batch_s": ready - opened,
        "opening_and_first_batch_s": ready - imported,
        "cpu_s": sum(used),
        "imports_cpu_s": before_s,
        "rank_rss_mib": rss_mib(os.getpid()),
        "rank_rss_of_imports_mib": memory_before,
        "rank_and_workers_pss_mib": pss,
    }
    loader.close()
    import deepspeed  # noqa: F401  a rank of training holds it as well

    return result | {"rank_rss_with_deepspeed_mib": rss_mib(os.getpid())}


def children_of_this_process() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


def rss_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / MIB for line in lines if line.startswith("VmRSS"))


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def pss_mib(pid: int) -> float:
    """Memory of a process, pages that several share counted by their share."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / MIB for line in lines if line.startswith("Pss:"))


def as_markdown(result: dict[str, Any]) -> str:
    cpu = result["machine"]
    names = {
        "opening_s": "opening: manifest, files, tokenizer, s",
        "first_batch_s": "loader start and first batch of 64, s",
        "opening_and_first_batch_s": "both, s",
        "cpu_s": "CPU time of both, rank and workers together, s",
        "imports_s": "imports before (torch, transformers), s",
        "imports_cpu_s": "CPU time of the imports, s",
        "from_process_start_s": "from the start of the process, s",
        "rank_rss_mib": "resident memory of the rank, MiB",
        "rank_rss_of_imports_mib": "of it after the imports alone, MiB",
        "rank_rss_with_deepspeed_mib": "of a rank that holds DeepSpeed as well, MiB",
        "rank_and_workers_pss_mib": f"rank and {result['workers']} workers together (PSS), MiB",
    }
    steps = list(result["steps"])
    lines = [
        f"{result['rows']:,} rows in {result['shards']:,} shards; {cpu['cores']} x {cpu['cpu']}, load "
        f"{cpu['load_average']:.0f}, torch {cpu['torch']}",
        "",
        f"| median (min, max) | {' | '.join(f'step {int(step):,}' for step in steps)} |",
        f"|---|{'---|' * len(steps)}",
    ]
    for key, name in names.items():
        cells = []
        for step in steps:
            values = [run[key] for run in result["steps"][step]]
            digits = 2 if key.endswith("_s") else 0
            cells.append(f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}, {max(values):.{digits}f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"`{result['command']}`"])


if __name__ == "__main__":
    raise SystemExit(main())
