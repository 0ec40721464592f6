"""Is loading the limit? Times its stages, and the loader against a bare loop over the same JPEGs."""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, __version__
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_prep.record import Record
from data_prep.shard_writer import SplitWriter
from model.config import FLMOptions
from model.plans.flm import FLMPlanner
from pipeline.data.order import SampleOrder
from pipeline.data.shard_reader import Corpus, open_corpora
from pipeline.data.tokenizer import TextTokenizer, clean_caption
from pipeline.data.transforms import DEFAULT_MAX_PIXELS, clip_transform, decode_image, draft_size
from pipeline.distributed.host_cores import usable_cores
from pipeline.loading.collate import collate
from pipeline.loading.datasets import Preparation, SampleReader, TrainDataset
from pipeline.loading.loader import LoaderOptions, build_train_loader
from pipeline.pictures.pictures import Pictures
from pipeline.tasks.caption_rows import CaptionRows

SEED = 0
MODES = {"exact": False, "fast": True}  # name -> data.fast_decode
MAX_TEXT_LENGTH = 50
OBJECTIVE = FLMOptions()  # the defaults of pretraining
WORDS = "a the two red blue small large dog cat man woman boat street tree runs stands holds near under on with".split()


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            result = measure(open_or_write(arguments, Path(scratch)), arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result["command"] = "python -m benchmarks.cost.loading " + " ".join(argv if argv is not None else sys.argv[1:])
    result["machine"] = machine()
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")
    print(as_markdown(result))
    return 0


def open_or_write(arguments: argparse.Namespace, scratch: Path) -> list[Corpus]:
    if arguments.data:
        return open_corpora([arguments.data], arguments.split)
    return [Corpus(write_synthetic(scratch / "synthetic" / "train", arguments.synthetic, arguments.image_px))]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost.loading", description=__doc__)
    parser.add_argument("--data", help="prepared corpus or root; without it photograph-like JPEGs are generated")
    parser.add_argument("--split", default="train")
    parser.add_argument(
        "--synthetic", type=int, default=500, metavar="N", help="number of generated JPEGs (default 500)"
    )
    parser.add_argument("--image-px", type=int, default=500, help="longer side of generated JPEGs, 4:3 (default 500)")
    parser.add_argument("--image-size", type=int, default=288, help="model resolution (default 288)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--samples", type=int, default=2048, help="samples per timing of the loops (default 2048)")
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5, help="paired repeats, interleaved (default 5)")
    parser.add_argument("--output", help="write the figures as JSON here")
    return parser.parse_args(argv)


def measure(corpora: list[Corpus], arguments: argparse.Namespace) -> dict[str, Any]:
    """Stage times in milliseconds per sample, and per number of workers samples/s of both loops and their ratios."""
    tokenizer = train_tokenizer(corpora)
    planner = FLMPlanner(tokenizer.vocabulary, OBJECTIVE.corruption_rate, OBJECTIVE.negative_share)
    order = SampleOrder([len(corpus) for corpus in corpora], SEED)
    steps = max(arguments.samples // arguments.micro_batch, 1)
    places = order.at_many(range(steps * arguments.micro_batch))
    encoded = [corpora[c].read(i).images[0] for c, i in zip(places[0].tolist(), places[1].tolist())]
    result: dict[str, Any] = {
        "source": str(arguments.data) if arguments.data else f"generated, longer side {arguments.image_px} px",
        "jpeg_kib": sum(map(len, encoded)) / len(encoded) / 1024,
        "image_size": arguments.image_size,
        "stages_ms": {
            name: stages(corpora, order, planner, tokenizer, arguments, fast) for name, fast in MODES.items()
        },
        "loops": [],
    }
    for workers in arguments.workers:
        runs = {"bare": partial(bare_rate, encoded, arguments.image_size, workers, arguments.micro_batch)}
        preparation = Preparation(
            CaptionRows(tokenizer, MAX_TEXT_LENGTH, OBJECTIVE.negative_share), planner, arguments.image_size
        )
        for name, fast in MODES.items():
            loader = partial(
                build_train_loader,
                corpora,
                order,
                preparation,
                micro_batch=arguments.micro_batch,
                accumulation=1,
                rank=0,
                world=1,
                start_step=0,
                num_steps=steps,
                seed=SEED,
                options=LoaderOptions(num_workers=workers, fast_decode=fast),
            )
            runs[name] = partial(loader_rate, loader)
        rounds = [
            {name: runs[name]() for name in (runs if repeat % 2 else reversed(runs))}
            for repeat in range(arguments.repeats)
        ]
        result["loops"].append({"workers": workers, "samples_per_second": rounds})
    return result


def loader_rate(build: Callable) -> float:
    """Samples per second of the loader, from its first batch to its last."""
    return rate(len(batch.keys) for batch in build())


def bare_rate(encoded: list[bytes], size: int, workers: int, part: int) -> float:
    """Samples per second of a pool of processes that decode, resize and crop JPEGs in memory, and forget them."""
    global _encoded
    _encoded = encoded  # forked workers inherit it: nothing to read, nothing to send
    parts = [range(start, min(start + part, len(encoded))) for start in range(0, len(encoded), part)]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        return rate(pool.imap(partial(_bare, size=size), parts))


def rate(counts: Iterable[int]) -> float:
    """Sum of all counts but the first over the time from the first to the last: the start of processes is not timed."""
    counts = iter(counts)
    next(counts)
    start = time.perf_counter()
    total = sum(counts)
    return total / (time.perf_counter() - start)


_encoded: list[bytes] = []


def _bare(part: range, size: int) -> int:
    for number in part:
        image = Image.open(io.BytesIO(_encoded[number]))
        image.load()
        if image.mode != "RGB":
            image = image.convert("RGB")
        scale = size / min(image.size)
        width, height = (max(int(side * scale + 1e-6), size) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        image.crop((left, top, left + size, top + size))
    return len(part)


def stages(
    corpora: list[Corpus],
    order: SampleOrder,
    planner: FLMPlanner,
    tokenizer: TextTokenizer,
    arguments: argparse.Namespace,
    fast: bool,
) -> dict[str, float]:
    """Milliseconds per sample of each stage in this process, median over parts of one micro-batch."""
    draft, transform = draft_size(arguments.image_size, fast), clip_transform(arguments.image_size, fast)
    maker = CaptionRows(tokenizer, MAX_TEXT_LENGTH, OBJECTIVE.negative_share)
    reader = SampleReader(corpora, maker, Pictures(transform, DEFAULT_MAX_PIXELS, draft))
    dataset, batch = TrainDataset(reader, order, SEED), arguments.micro_batch
    out = torch.zeros((batch, *reader.image_shape), dtype=torch.uint8)
    times: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        value = work()
        times.setdefault(name, []).append((time.perf_counter() - start) * 1000 / batch)
        return value

    for number in range(8):
        positions = range(number * batch, (number + 1) * batch)
        corpus, index, _ = timed("order", lambda p=positions: order.at_many(p))
        places = list(zip(corpus.tolist(), index.tolist()))
        samples = timed("read", lambda p=places: [corpora[c].read(i) for c, i in p])
        decoded = timed("decode", lambda s=samples: [decode_image(x.images[0], draft_size=draft) for x in s])
        timed("resize, crop, store", lambda d=decoded: [transform(image, out[n, 0]) for n, image in enumerate(d)])
        timed(
            "tokenise", lambda s=samples: [tokenizer.encode(clean_caption(x.text, False), MAX_TEXT_LENGTH) for x in s]
        )
        items = timed("all of these, with negatives", lambda p=positions: dataset.items(p, out))
        timed("collate and plan", lambda i=items: collate(i, out, planner))
    return {name: statistics.median(values) for name, values in times.items()}


def write_synthetic(split_dir: Path, count: int, longer_side: int) -> Path:
    """A split of ``count`` photograph-like JPEGs (smooth shapes, texture, sensor noise) at quality 90."""
    generator = np.random.default_rng(SEED)
    with SplitWriter(split_dir, "synthetic", split_dir.name) as writer:
        for number in range(count):
            width, height = longer_side, longer_side * 3 // 4
            if number % 4 == 3:
                width, height = height, width
            caption = " ".join(generator.choice(WORDS, generator.integers(5, 20)))
            writer.add(Record(f"{number:06d}", (photograph_like(generator, width, height),), (caption,), {}, ("jpg",)))
    return split_dir


def photograph_like(generator: np.random.Generator, width: int, height: int) -> bytes:
    """Noise at three scales on a gradient: compresses about as a photograph does."""
    pixels = np.linspace(60, 180, width)[None, :, None] + np.zeros((height, width, 3))
    for cell, strength in ((48, 45.0), (8, 14.0), (2, 5.0)):
        coarse = generator.normal(128, strength, (height // cell + 2, width // cell + 2, 3)).clip(0, 255)
        layer = Image.fromarray(coarse.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        pixels += np.asarray(layer, dtype=np.float64) - 128
    stream = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def train_tokenizer(corpora: list[Corpus], captions: int = 2000) -> TextTokenizer:
    """A byte-level BPE of the first captions: the loader's cost does not depend on which one it is."""
    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    names = ["<s>", "<pad>", "</s>", "<mask>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=8000, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    texts = (corpora[0].read_text(index) for index in range(min(len(corpora[0]), captions)))
    engine.train_from_iterator(texts, trainer)
    return TextTokenizer(engine, {"bos": 0, "pad": 1, "eos": 2, "mask": 3}, "benchmark")


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": usable_cores(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pillow": __version__,
    }


def as_markdown(result: dict[str, Any]) -> str:
    cpu, stage_times = result["machine"], result["stages_ms"]
    lines = [
        f"{result['source']}: JPEGs of {result['jpeg_kib']:.0f} KiB to {result['image_size']} px; "
        f"{cpu['cores']} x {cpu['cpu']}, Pillow {cpu['pillow']}, torch {cpu['torch']}",
        "",
        "| stage, ms per sample | exact | fast_decode |",
        "|---|---|---|",
        *(f"| {name} | {ms:.3f} | {stage_times['fast'][name]:.3f} |" for name, ms in stage_times["exact"].items()),
        "",
        "| workers | bare loop, samples/s | exact | exact / bare | fast_decode | fast_decode / bare |",
        "|---|---|---|---|---|---|",
    ]
    for loop in result["loops"]:
        rounds = loop["samples_per_second"]
        cells = [str(loop["workers"]), f"{statistics.median(r['bare'] for r in rounds):.0f}"]
        for name in MODES:
            ratios = [r[name] / r["bare"] for r in rounds]
            cells.append(f"{statistics.median(r[name] for r in rounds):.0f}")
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", "Ratios are medians (min, max) of paired repeats.", "", f"`{result['command']}`"])


if __name__ == "__main__":
    raise SystemExit(main())
