"""Cost of one FLM step in units of its own vision tower, against the released layout, in one run.

    python -m benchmarks.step_cost --captions FILE.tsv [--batch 8] [--repeats 5] [--output benchmarks/results/NAME.json]

The unit is forward + backward of the vision tower at the same batch, so figures travel between machines. Ours and the
reference (benchmarks/released_layout.py) take turns. Caption lengths come from the first column of a TSV (Conceptual
Captions' own format), tokenized by a byte-level BPE trained on that file; without a file they are drawn from a
log-normal distribution with a mean of 12 tokens. fp32 on CPU, bf16 on CUDA, dropout as in training.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.released_layout import ReleasedLayout
from model.batch import Batch, Row
from model.build import build_objective
from model.config import ModelConfig, ObjectiveConfig, Vocabulary

VOCABULARY = Vocabulary(size=50265, bos_id=0, pad_id=1, eos_id=2, mask_id=50264)
FULL_LENGTH = 50


def main() -> None:
    arguments = parse_arguments()
    keep_freed_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    lengths = caption_lengths(arguments.captions)
    generator = np.random.default_rng(0)
    ours = objective("default", device)
    released = objective("released", device)
    reference = ReleasedLayout(released).train()
    images = torch.randint(0, 256, (arguments.batch, 1, 3, 288, 288), dtype=torch.uint8)
    rows = draw_rows(lengths, arguments.batch, generator, ours.planner.negative_share)
    batch = ours.planner(images, rows).to(device)
    padded, text_lengths = padded_text(rows[: arguments.batch], device)
    runs: dict[str, Callable[[], None]] = {
        "unit": lambda: ours.net.vision(batch.images[:, 0]).sum().backward(),
        "ours": lambda: weighted_loss(ours, batch).backward(),
        "released_layout": lambda: reference(batch.images[:, 0], padded, text_lengths).backward(),
    }
    seconds = measure(runs, [ours, released], arguments.repeats, device)
    result = summary(seconds, ours, batch, lengths, arguments, device)
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=Path, help="TSV whose first column is a caption")
    parser.add_argument("--batch", type=int, default=8, help="samples per step")
    parser.add_argument("--repeats", type=int, default=5, help="counted turns of each, after one that is not")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_args()


def keep_freed_memory() -> None:
    """Keeps freed blocks in the process (glibc): pages of large activations are not given back and faulted in anew."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own mapping
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def objective(behaviour: str, device: str) -> torch.nn.Module:
    built = build_objective(ModelConfig(behaviour=behaviour), ObjectiveConfig(), VOCABULARY, FULL_LENGTH)
    return (built.bfloat16() if device == "cuda" else built).to(device).train()


def caption_lengths(file: Path | None) -> np.ndarray:
    """Tokens per caption with both ends, at most 50."""
    if file is None:
        drawn = np.random.default_rng(1).lognormal(np.log(11.2), 0.38, 15_000)
        return np.clip(drawn.round().astype(int), 3, FULL_LENGTH)
    from tokenizers import ByteLevelBPETokenizer

    captions = [line.split("\t")[0] for line in file.read_text().splitlines()]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(captions, vocab_size=VOCABULARY.size, min_frequency=2, show_progress=False)
    return np.array([min(len(encoded.ids) + 2, FULL_LENGTH) for encoded in tokenizer.encode_batch(captions)])


def draw_rows(lengths: np.ndarray, batch: int, generator: np.random.Generator, negative_share: float) -> list[Row]:
    """A batch whose lengths stand at evenly spaced quantiles of the corpus, so that its mean is the corpus's."""
    quantiles = np.quantile(lengths, (np.arange(batch) + 0.5) / batch).round().astype(int)
    number_of_negatives = round(batch * negative_share)
    chosen = [*quantiles, *np.full(number_of_negatives, round(lengths.mean()))]
    rows = []
    for number, length in enumerate(chosen):
        words = generator.integers(3, VOCABULARY.mask_id, length - 2).tolist()
        negative = number >= batch
        rows.append(Row([0, *words, 2], number % batch, seed=number, role="negative" if negative else "pair"))
    return rows


def padded_text(rows: list[Row], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    text = torch.full((len(rows), FULL_LENGTH), VOCABULARY.pad_id)
    for number, row in enumerate(rows):
        text[number, : len(row.token_ids)] = torch.tensor(row.token_ids)
    return text.to(device), torch.tensor([len(row.token_ids) for row in rows], device=device)


def weighted_loss(ours: torch.nn.Module, batch: Batch) -> torch.Tensor:
    counts = batch.counts
    return sum(ours.term_weights[name] * value / max(counts[name], 1) for name, value in ours(batch).items())


def measure(runs: dict[str, Callable], modules: list, repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of each run in turn; gradients are cleared, not freed, between them, as an optimizer loop does."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            for module in modules:
                module.zero_grad(set_to_none=False)
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds: dict, ours, batch: Batch, lengths: np.ndarray, arguments: argparse.Namespace, device: str) -> dict:
    median = {name: statistics.median(values) for name, values in seconds.items()}
    turns = list(zip(seconds["unit"], seconds["ours"], seconds["released_layout"], strict=True))
    bytes_each = 4
    released_logits = arguments.batch * 3 * (FULL_LENGTH - 1) * VOCABULARY.size * bytes_each
    our_logits = sum(batch.counts[name] for name in ("flm", "l2r", "r2l")) * ours.lm_head.chunk_size * bytes_each
    return {
        "command": " ".join(["python -m benchmarks.step_cost", *sys.argv[1:]]),
        "hardware": torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "batch": arguments.batch,
        "mean_caption_tokens": {
            "corpus": float(lengths.mean()),
            "batch": float(batch.lengths[: arguments.batch].float().mean()),
        },
        "seconds": {name: [round(value, 3) for value in values] for name, values in seconds.items()},
        "median_units": {
            "ours": median["ours"] / median["unit"],
            "released_layout": median["released_layout"] / median["unit"],
        },
        "speedup_per_turn": [round(released / own, 2) for _, own, released in turns],
        "median_speedup": statistics.median(released / own for _, own, released in turns),
        "logit_bytes": {"ours": our_logits, "released_layout": released_logits, "ratio": our_logits / released_logits},
        "training_gflop_per_sample": ours.flops(batch) / arguments.batch / 1e9,
    }


if __name__ == "__main__":
    main()
