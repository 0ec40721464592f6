"""The planner against measurement: memory of a rank and seconds of a step, on CPU ranks of this machine.

    python -m benchmarks.cost.planner [--repeats 2] [--only NAME ...] [--output benchmarks/results/planner.json]

Every configuration is two runs of the training program on synthetic scenes, with one thread a rank. One saves in its
course and at its end: its peak of a rank's resident memory (VmHWM) is compared with ``memory_of``; the interpreter and
its libraries are a constant, measured by a run of the smallest recipe. The other saves at its end only, for a
checkpoint that is written beside steps slows them: a step is the median over its steps, the best of the repeats; the
machine's constants are fitted on some configurations and judged on the others.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cost.loading import machine as machine_in_words
from benchmarks.cost.training_ranks import Trained, make_data, train
from pipeline.config.command_line import parse_command_line
from pipeline.data.shard_reader import Corpus
from pipeline.data.tokenizer import tokenizer_of
from pipeline.deepspeed_json.ds_config import Device, read_ds_config, resolve
from pipeline.dry_run.counting import counted, valueless
from pipeline.planning.counts import Parameters, Work, count_parameters
from pipeline.planning.memory import CPU, HEAP_BLOCK, Memory, Zero, memory_of, zero_of
from pipeline.planning.speed import Demands, Machine, demands_of, speed_of

SAVE_EVERY = 3  # steps of a run whose memory is measured
NOT_COUNTED = 2  # first steps of a run, in which the heap finds its size
SMALL = "--recipe flm_tiny --data.num_workers 1"
COMMON = (
    "--recipe demo --train.eval_every 0 --train.eval_samples 4 --train.precision auto"
    " --tracking.tensorboard false --tracking.report false --guard.save_incident_every 0"
    " --data.num_workers 1 --data.prefetch 1 --model.reconstructor.bottom_layers null --model.text.heads 8"
    " --optim.warmup_fraction 0 --optim.learning_rate 1e-5"
)
WIDE = "--model.text.width 512 --model.text.ffn_width 2048 --model.vision.width 512 --model.vision.head_width 64"
WIDER = "--model.text.width 768 --model.text.ffn_width 3072 --model.vision.width 384 --model.vision.head_width 64"
NARROW = "--model.text.width 64 --model.text.ffn_width 256 --model.vision.width 64 --model.vision.head_width 16"
IMAGES = (
    "--model.text.width 256 --model.text.ffn_width 1024 --model.vision.width 256 --model.vision.layers 8"
    " --model.vision.image_size 128"
)
CONFIGURATIONS: dict[str, tuple[int, int, int, int, str]] = {  # ranks, ZeRO stage, micro-batch, accumulation, options
    "zero0, 1 rank": (1, 0, 2, 1, WIDE),
    "zero0, 2 ranks": (2, 0, 4, 1, WIDE),
    "zero1, 1 rank, 2 micro-batches": (1, 1, 4, 2, WIDE),
    "zero1, 2 ranks": (2, 1, 2, 1, WIDER),
    "zero2, 1 rank": (1, 2, 2, 1, WIDER),
    "zero2, 2 ranks, dropout": (2, 2, 8, 1, f"{WIDE} --model.text.dropout 0.1"),
    "zero2, 1 rank, images": (1, 2, 16, 1, IMAGES),
    "zero2, 1 rank, images, checkpointing": (1, 2, 16, 1, f"{IMAGES} --model.activation_checkpointing true"),
    "zero3, 1 rank": (1, 3, 2, 1, WIDE),
    "zero3, 2 ranks": (2, 3, 4, 1, WIDE),
    "zero0, 1 rank, narrow": (1, 0, 2, 1, NARROW),  # what a step costs beside products and bytes
    "zero3, 1 rank, narrow": (1, 3, 2, 1, NARROW),
}
FITTED = (  # the others are judged
    "zero0, 1 rank",
    "zero0, 2 ranks",
    "zero1, 1 rank, 2 micro-batches",
    "zero2, 1 rank, images",
    "zero3, 2 ranks",
    "zero0, 1 rank, narrow",
    "zero3, 1 rank, narrow",
)


@dataclasses.dataclass(frozen=True)
class Counted:
    """A configuration as the planner sees it."""

    ranks: int
    accumulation: int
    zero: Zero
    parameters: Parameters
    work: Work
    demands: Demands
    memory: Memory


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    names = arguments.only or list(CONFIGURATIONS)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = Path(scratch)
        data = make_data(folder / "data", image_size=64)
        base = max(train([*SMALL.split(), "--data", str(data)], 2, folder / "base").peak_bytes)
        print(f"smallest recipe: {base / 1e6:.0f} MB", file=sys.stderr, flush=True)
        tried: dict[str, list[Trained]] = {name: [] for name in names}
        for repeat, name in itertools.product(range(arguments.repeats), names):
            words = [*words_of(name), "--data", str(data)]
            tried[name].append(measure(words, CONFIGURATIONS[name][0], arguments.steps, folder / f"{name}-{repeat}"))
            print(f"{name}: {shown(tried[name][-1])}", file=sys.stderr, flush=True)
        given_data = ["--data", str(data)]
        counts = {name: count([*words_of(name), *given_data], CONFIGURATIONS[name][0], data, base) for name in names}
    given = list(sys.argv[1:] if argv is None else argv)
    result = {"command": " ".join(["python -m benchmarks.cost.planner", *given]), "machine": machine_in_words()}
    result |= {"load_average_at_the_end": round(os.getloadavg()[0], 1), "base_bytes": base}
    result |= judged(counts, tried)
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(as_markdown(result))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost.planner", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=2, help="runs of each configuration (default 2)")
    parser.add_argument(
        "--steps", type=int, default=14, help=f"of a run that is timed, {NOT_COUNTED} not counted (default 14)"
    )
    parser.add_argument("--only", nargs="+", choices=list(CONFIGURATIONS), metavar="NAME", help="these configurations")
    parser.add_argument("--folder", type=Path, help="where data and runs are made (default: the temporary folder)")
    parser.add_argument("--output", type=Path, help="write the figures as JSON here")
    arguments = parser.parse_args(argv)
    if arguments.steps <= NOT_COUNTED:
        parser.error(f"--steps {arguments.steps}: the first {NOT_COUNTED} are not counted; give more")
    return arguments


def words_of(name: str) -> list[str]:
    """Options of training of a configuration."""
    ranks, stage, size, accumulation, options = CONFIGURATIONS[name]
    sizes = f"--optim.micro_batch_size {size} --optim.batch_size {ranks * size * accumulation}"
    return f"{COMMON} --deepspeed ds_configs/zero{stage}.json {options} {sizes}".split()


def measure(words: Sequence[str], ranks: int, steps: int, folder: Path) -> Trained:
    """Peak of a run that saves, seconds of ``steps`` steps of another that does not until its end."""
    every = lambda step: ["--train.save_every", str(step)]  # noqa: E731
    saving = train([*words, "--train.steps", str(2 * SAVE_EVERY + 2), *every(SAVE_EVERY)], ranks, folder / "saving")
    timed = train([*words, "--train.steps", str(steps), *every(steps)], ranks, folder / "timed")
    return Trained(saving.peak_bytes, timed.step_seconds)


def shown(trained: Trained) -> str:
    peaks = ", ".join(f"{peak / 1e6:.0f} MB" for peak in trained.peak_bytes)
    return f"{peaks}; {seconds_of([trained]):.3f} s a step"


def seconds_of(runs: Sequence[Trained]) -> float:
    """The median of a run's steps but the first few, the best of several runs: other work only ever adds."""
    return min(statistics.median(run.step_seconds[NOT_COUNTED:]) for run in runs)


def count(words: Sequence[str], ranks: int, data: Path, base: int, texts: float | None = None) -> Counted:
    """Options of training by the planner, texts of ``texts`` tokens, or as long as those of the corpus ``data`` are on
    average."""
    launch = parse_command_line(list(words))
    config = launch.config
    tokenizer = tokenizer_of(config)
    resolved = resolve(read_ds_config(launch.deepspeed), config, ranks, Device("cpu", has_bf16=True))
    objective = valueless(config, tokenizer.vocabulary, "fp32")
    texts = texts or mean_tokens(data, tokenizer, config.data.max_text_length)
    work = counted(objective, config, config.optim.micro_batch_size, texts, "cpu", HEAP_BLOCK)
    zero, parameters = zero_of(resolved), count_parameters(objective)
    accumulation = resolved["gradient_accumulation_steps"]
    memory = memory_of(
        parameters,
        work.activations,
        zero,
        ranks,
        accumulation,
        dataclasses.replace(CPU, base=base),
        config.train.async_save,
        batches=work.image_bytes * (config.data.prefetch + 2) * config.data.num_workers,
    )
    demands = demands_of(parameters, work, zero, ranks, accumulation, "cpu")
    return Counted(ranks, accumulation, zero, parameters, work, demands, memory)


def mean_tokens(data: Path, tokenizer: Any, longest: int) -> float:
    """Of the first captions of the training split."""
    corpus = Corpus(data / "train")
    texts = [corpus.read_text(number) for number in range(200)]
    return statistics.mean(len(tokenizer.encode(text, longest)) for text in texts)


def judged(counts: Mapping[str, Counted], tried: Mapping[str, Sequence[Trained]]) -> dict[str, Any]:
    """Planned against measured, by configuration."""
    seconds = {name: seconds_of(runs) for name, runs in tried.items()}
    fitted = [name for name in FITTED if name in counts]
    constants = fit({name: counts[name] for name in fitted}, seconds)
    rows = {}
    for name, one in counts.items():
        measured = max(peak for run in tried[name] for peak in run.peak_bytes)
        speed = speed_of(one.demands, machine_of(constants), one.work, one.ranks, one.accumulation)
        rows[name] = {
            "ranks": one.ranks,
            "options": " ".join(words_of(name)),
            "parameters": one.parameters.trained,
            "memory_bytes": {"planned": one.memory.peak, "measured": measured},
            "memory_off": one.memory.peak / measured - 1,
            "memory_by_part": {**one.memory.held, **one.memory.moments[one.memory.moment]},
            "moment": one.memory.moment,
            "step_seconds": {"planned": speed.step_seconds, "measured": seconds[name]},
            "step_seconds_of_runs": [
                round(statistics.median(run.step_seconds[NOT_COUNTED:]), 4) for run in tried[name]
            ],
            "time_off": speed.step_seconds / seconds[name] - 1,
            "fitted": name in fitted,
        }
    return {"constants": constants, "configurations": rows}


def fit(counts: Mapping[str, Counted], seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds of a unit of each demand, none below 0, with the least relative errors."""
    names = list(counts)
    columns = {key: np.array([units(counts[name])[key] / seconds[name] for name in names]) for key in units_names()}
    best: tuple[float, dict[str, float]] | None = None
    for size in range(1, min(len(names), len(columns)) + 1):
        for chosen in itertools.combinations(columns, size):
            matrix = np.stack([columns[key] for key in chosen], axis=1)
            scale = np.abs(matrix).max(axis=0)
            if not scale.all():
                continue
            values = np.linalg.lstsq(matrix / scale, np.ones(len(names)), rcond=None)[0] / scale
            error = float(np.square(matrix @ values - 1).sum())
            if (values >= 0).all() and (best is None or error < best[0] * 0.9):
                best = error, dict(zip(chosen, values.tolist(), strict=True))
    assert best is not None
    return {key: best[1].get(key, 0.0) for key in columns}


def units_names() -> tuple[str, ...]:
    return "flops", "states", "summed", "gathered", "operations", "hooked"


def units(one: Counted) -> dict[str, float]:
    """How much of each demand a step has: products; bytes of weights, gradients and moments; bytes over the ranks;
    operations; modules with hooks."""
    demands = one.demands
    return {
        "flops": demands.flops,
        "states": demands.optimizer_traffic,
        "summed": demands.reduced,
        "gathered": demands.gathered / 2,
        "operations": demands.operations,
        "hooked": demands.hooked,
    }


def machine_of(constants: Mapping[str, float]) -> Machine:
    """The constants as those of the planner; what fell out of the fit costs nothing."""
    rate = lambda name: 1 / constants[name] if constants[name] else float("inf")  # noqa: E731
    summed = max(constants["summed"], 1e-15)  # gathering is said in its time
    return dataclasses.replace(
        Machine(),
        kind="cpu",
        flops=rate("flops"),
        memory_bandwidth=rate("states"),
        node_bandwidth=1 / summed,
        gathering=constants["gathered"] / summed,
        operation_seconds=constants["operations"],
        hook_seconds=constants["hooked"],
        message_seconds=0.0,
        step_seconds=0.0,
    )


def as_markdown(result: Mapping[str, Any]) -> str:
    """A table of planned and measured."""
    rows = [
        "| configuration | M parameters | memory: planned, measured, MB | off | step: planned, measured, s | off |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["configurations"].items():
        memory, seconds = row["memory_bytes"], row["step_seconds"]
        rows.append(
            f"| {name} | {row['parameters'] / 1e6:.0f} | {memory['planned'] / 1e6:.0f}, {memory['measured'] / 1e6:.0f}"
            f" | {row['memory_off']:+.1%} | {seconds['planned']:.2f}, {seconds['measured']:.2f} |"
            f" {row['time_off']:+.0%}{' (fitted)' if row['fitted'] else ''} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
