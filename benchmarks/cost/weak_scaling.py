"""Weak scaling from 1 to 2 ranks of this machine, beside what two processes that know nothing of each other lose.

    python -m benchmarks.cost.weak_scaling [--recipe flm_small] [--turns 5] [--output FILE]

Turns of three kinds follow one another: one rank alone; two independent trainings of one rank at once, which share the
memory's bandwidth and caches but no work; two ranks of one training with twice the batch. A rank has one thread and as
many samples in each. A turn is a run of the training program, its time the median of its steps. The bound is alone over
independent, weak scaling is alone over two ranks; what is asked for is the share of the bound that is reached, of each
turn and as the median. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cost.loading import machine
from benchmarks.cost.training_ranks import Run, Trained, finish, make_data
from pipeline.config.command_line import parse_command_line

KINDS = ("alone", "independent", "two ranks")
NOT_COUNTED = 3  # first steps of a run, in which the heap finds its size


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    words = [
        *("--recipe", arguments.recipe, "--deepspeed", f"ds_configs/zero{arguments.stage}.json"),
        *("--train.steps", str(arguments.steps), "--train.eval_every", "0", "--train.eval_samples", "4"),
        *("--train.save_every", "0", "--train.precision", "fp32", "--guard.save_incident_every", "0"),
        *("--tracking.tensorboard", "false", "--tracking.report", "false", "--data.num_workers", "1"),
        *arguments.options,
    ]
    batch = parse_command_line(words).config.optim.batch_size
    turns: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        data = make_data(Path(scratch) / "data", image_size=112)
        words += ["--data", str(data)]
        for turn in range(arguments.turns):
            folder = Path(scratch) / str(turn)
            kinds = KINDS if turn % 2 == 0 else KINDS[::-1]  # a slow drift of the machine meets both orders
            turns.append({kind: take_turn(kind, words, batch, folder) for kind in kinds})
            print(f"turn {turn + 1} of {arguments.turns}: {ratios(turns[-1])}", file=sys.stderr, flush=True)
    given = list(sys.argv[1:] if argv is None else argv)
    result = {
        "command": " ".join(["python -m benchmarks.cost.weak_scaling", *given]),
        "machine": machine(),
        "load_average_at_the_end": round(os.getloadavg()[0], 1),
        "samples_per_rank": batch,
        "step_seconds": turns,
        "turns": [ratios(turn) for turn in turns],
    }
    result["median"] = {name: statistics.median(turn[name] for turn in result["turns"]) for name in result["turns"][0]}
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(as_markdown(result))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cost.weak_scaling",
        description=__doc__.splitlines()[0],
        epilog="Options of training, after --, hold in all turns; batch and micro-batch are those of one rank.",
    )
    parser.add_argument("--recipe", default="flm_small")
    parser.add_argument("--stage", type=int, choices=(0, 1, 2, 3), default=2, help="ZeRO stage (default 2)")
    parser.add_argument("--steps", type=int, default=NOT_COUNTED + 12, help="steps of a turn (default 15)")
    parser.add_argument("--turns", type=int, default=5, help="of each kind (default 5)")
    parser.add_argument("--folder", type=Path, help="where data and runs are made (default: the temporary folder)")
    parser.add_argument("--output", type=Path, help="write the figures as JSON here")
    parser.add_argument("options", nargs="*", help="options of training")
    arguments = parser.parse_args(argv)
    if arguments.steps <= NOT_COUNTED:
        parser.error(f"--steps {arguments.steps}: the first {NOT_COUNTED} are not counted; give more")
    return arguments


def take_turn(kind: str, words: Sequence[str], batch: int, folder: Path) -> float:
    """Seconds of a step in one turn; of two independent trainings their mean."""
    if kind == "two ranks":
        runs = [Run([*words, "--optim.batch_size", str(2 * batch)], 2, folder / "two_ranks")]
    else:
        count = 2 if kind == "independent" else 1
        runs = [Run(words, 1, folder / f"{kind}-{number}") for number in range(count)]
    return statistics.mean(seconds_of(trained) for trained in finish(runs))


def seconds_of(trained: Trained) -> float:
    return statistics.median(trained.step_seconds[NOT_COUNTED:])


def ratios(turn: Mapping[str, float]) -> dict[str, float]:
    bound, scaling = turn["alone"] / turn["independent"], turn["alone"] / turn["two ranks"]
    named = {"bound": bound, "weak scaling": scaling, "share of the bound": scaling / bound}
    return {name: round(value, 4) for name, value in named.items()}


def as_markdown(result: Mapping[str, Any]) -> str:
    names = list(result["median"])
    rows = [f"| turn | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for label, values in [*enumerate(result["turns"], 1), ("median", result["median"])]:
        rows.append(f"| {label} | {' | '.join(f'{values[name]:.3f}' for name in names)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
