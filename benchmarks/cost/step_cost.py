"""Cost of one FLM step in units of its own vision tower, against the released layout, in one run.

    python -m benchmarks.cost.step_cost --captions FILE.tsv [--batch 8] [--repeats 5] [--objectives flm mlm ar prefixlm]
                                   [--output benchmarks/results/NAME.json]

The unit is forward + backward of the vision tower at the same batch, so figures travel between machines. Ours takes
turns with the unit, then the reference (benchmarks/cost/released_layout.py) does, each against its own unit. Lengths of
captions come from the first column of a TSV (Conceptual Captions' own format), tokenized by a byte-level BPE trained on
that file; without a file they are drawn from a log-normal distribution with a mean of 12 tokens. fp32 on CPU, bf16 on
CUDA, dropout as in training.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cost.released_layout import ReleasedLayout
from model.batch import Batch, Row
from model.build import build_objective
from model.config import FLMOptions, ModelConfig, Vocabulary, objective_options
from model.heads import LanguageModelHead
from pipeline.distributed.host_memory import keep_freed_memory
from pipeline.recording.environment import device_name

VOCABULARY = Vocabulary(size=50265, bos_id=0, pad_id=1, eos_id=2, mask_id=50264)
FULL_LENGTH = 50
WARM_UP_TURNS = 4  # until the heap has found its size and no page is faulted in any more


def main() -> None:
    arguments = parse_arguments()
    keep_freed_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    lengths = caption_lengths(arguments.captions)
    generator = np.random.default_rng(0)
    share = FLMOptions().negative_share
    samples = []  # enough micro-batches for one negative caption at the objectives' share
    for number in range(max(1, round(1 / (arguments.batch * share)))):
        rows = draw_rows(lengths, arguments.batch, generator)
        negatives = round(arguments.batch * share) or int(number == 0)
        images = torch.randint(0, 256, (arguments.batch, 1, 3, 288, 288), dtype=torch.uint8)
        samples.append((images, rows, [negative_row(lengths, generator)] * negatives))
    built = {name: objective(name, "default", device) for name in arguments.objectives}
    batches = {
        name: [one.planner(images, rows + negatives).to(device) for images, rows, negatives in samples]
        for name, one in built.items()
    }
    first, first_batches = built[arguments.objectives[0]], batches[arguments.objectives[0]]
    released = objective("flm", "released", device)
    reference = ReleasedLayout(released).train()
    padded = [(images[:, 0].to(device), *padded_text(rows, device)) for images, rows, _ in samples]
    unit = [lambda batch=batch: first.net.vision(batch.images[:, 0]).sum() for batch in first_batches]
    runs: dict[str, list[Callable]] = {
        name: [lambda name=name, batch=batch: weighted_loss(built[name], batch) for batch in batches[name]]
        for name in built
    }
    runs["released_layout"] = [lambda inputs=inputs: reference(*inputs) for inputs in padded]
    modules = [*built.values(), released]
    seconds = {
        name: measure({"unit": unit, name: run}, modules, arguments.repeats, device) for name, run in runs.items()
    }
    flops = {name: flops_per_sample(built[name], batches[name], arguments.batch) for name in built}
    result = summary(seconds, flops, first_batches, lengths, arguments, device)
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=Path, help="TSV whose first column is a caption")
    parser.add_argument("--objectives", nargs="+", default=["flm"], choices=["flm", "mlm", "ar", "prefixlm"])
    parser.add_argument("--batch", type=int, default=8, help="samples per step")
    parser.add_argument("--repeats", type=int, default=5, help="counted turns of each, after some that are not")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_args()


def objective(name: str, behaviour: str, device: str) -> torch.nn.Module:
    built = build_objective(ModelConfig(behaviour=behaviour), objective_options(name), VOCABULARY, FULL_LENGTH)
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


def draw_rows(lengths: np.ndarray, batch: int, generator: np.random.Generator) -> list[Row]:
    """A batch whose lengths stand at evenly spaced quantiles of the corpus, so that its mean is the corpus's."""
    quantiles = np.quantile(lengths, (np.arange(batch) + 0.5) / batch).round().astype(int)
    return [Row(caption(length, generator), number, seed=number) for number, length in enumerate(quantiles)]


def negative_row(lengths: np.ndarray, generator: np.random.Generator) -> Row:
    return Row(caption(round(lengths.mean()), generator), 0, seed=0, role="negative")


def caption(length: int, generator: np.random.Generator) -> list[int]:
    return [0, *generator.integers(3, VOCABULARY.mask_id, length - 2).tolist(), 2]


def padded_text(rows: list[Row], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    text = torch.full((len(rows), FULL_LENGTH), VOCABULARY.pad_id)
    for number, row in enumerate(rows):
        text[number, : len(row.token_ids)] = torch.tensor(row.token_ids)
    return text.to(device), torch.tensor([len(row.token_ids) for row in rows], device=device)


def weighted_loss(ours: torch.nn.Module, batch: Batch) -> torch.Tensor:
    counts = batch.counts
    return sum(ours.term_weights[name] * value / max(counts[name], 1) for name, value in ours(batch).items())


def measure(runs: dict[str, list[Callable]], modules: list, repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of forward + backward of all micro-batches for each run in turn; every backward starts without gradients,
    as in a training loop (PyTorch's ``zero_grad``, DeepSpeed's ZeRO)."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-WARM_UP_TURNS, repeats):
        totals = dict.fromkeys(runs, 0.0)
        for number in range(len(runs["unit"])):  # side by side, so that all meet the same moods of the machine
            for name, micro_batches in runs.items():
                totals[name] += seconds_of(micro_batches[number], modules, device)
        shown = ", ".join(f"{name} {total:.2f} s" for name, total in totals.items())
        print(f"{'warm-up' if turn < 0 else f'turn {turn + 1} of {repeats}'}: {shown}", file=sys.stderr, flush=True)
        if turn >= 0:
            for name, total in totals.items():
                seconds[name].append(total)
    return seconds


def seconds_of(run: Callable, modules: list, device: str) -> float:
    for module in modules:
        module.zero_grad()
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run().backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def flops_per_sample(ours: torch.nn.Module, batches: list[Batch], samples: int) -> dict[str, float]:
    """GFLOP of forward + backward by our formula, and by PyTorch's counter (which counts recomputed logits too)."""
    with FlopCounterMode(display=False) as counter:
        for batch in batches:
            weighted_loss(ours, batch).backward()
    total = samples * len(batches) * 1e9
    analytic = sum(ours.flops(batch) for batch in batches) / total
    counted = counter.get_total_flops() / total
    return {"analytic_gflop": analytic, "counted_gflop": counted, "counted / analytic": counted / analytic}


def summary(
    seconds: dict, flops: dict, batches: list[Batch], lengths: np.ndarray, arguments: argparse.Namespace, device: str
) -> dict:
    """``batches`` are those of the first objective, whose vision tower is the unit."""
    units = {
        name: [own / unit for own, unit in zip(turns[name], turns["unit"], strict=True)]
        for name, turns in seconds.items()
    }
    bytes_each = 4
    released_logits = arguments.batch * 3 * (FULL_LENGTH - 1) * VOCABULARY.size * bytes_each
    targets = max(sum(count for name, count in batch.counts.items() if name != "itm") for batch in batches)
    our_logits = targets * LanguageModelHead(1, 1).chunk_size * bytes_each
    tokens = torch.cat([batch.plan.lengths[: arguments.batch] for batch in batches]).float().mean()
    return {
        "command": " ".join(["python -m benchmarks.cost.step_cost", *sys.argv[1:]]),
        "hardware": f"{device_name(torch.device(device))}, {torch.get_num_threads()} CPU threads",
        "torch": torch.__version__,
        "batch": arguments.batch,
        "micro_batches_timed_together": len(batches),
        "mean_caption_tokens": {
            "corpus": float(lengths.mean()),
            "batch": float(tokens),
        },
        "seconds": {
            f"{name}: {part}": [round(value, 3) for value in values]
            for name, turns in seconds.items()
            for part, values in turns.items()
        },
        "units_per_turn": {name: [round(value, 3) for value in values] for name, values in units.items()},
        "median_units": {name: round(statistics.median(values), 3) for name, values in units.items()},
        "speedup": {
            name: round(statistics.median(units["released_layout"]) / statistics.median(values), 3)
            for name, values in units.items()
        },
        "logit_bytes": {"ours": our_logits, "released_layout": released_logits, "ratio": our_logits / released_logits},
        "flops_per_sample": flops,
    }


if __name__ == "__main__":
    main()
