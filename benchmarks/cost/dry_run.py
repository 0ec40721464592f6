"""A dry run against the run that it is of: hours and memory, on ranks of this machine.

    python -m benchmarks.cost.dry_run [--ranks 2] [--turns 3] [--output benchmarks/results/dry_run.json]

Each turn is a dry run that measures ten steps, then the run itself from its first process to its last, on synthetic
scenes with one thread a rank. Time is the wall clock of the whole run, evaluations and saves included; memory is
the peak of a rank's resident memory (VmHWM).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cost.loading import machine
from benchmarks.cost.training_ranks import Run, Trained, finish, make_data

STEPS = 10
WORDS = (
    "--recipe demo --train.steps 60 --train.eval_every 30 --train.eval_samples 128 --train.save_every 30"
    " --model.text.width 256 --model.text.ffn_width 1024 --deepspeed ds_configs/zero2.json"
    " --tracking.tensorboard false --tracking.report false"  # libraries that the planner's memory does not count
)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    turns: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = Path(scratch)
        data = make_data(folder / "data", image_size=64, samples=2048)
        for number in range(arguments.turns):
            words = [*WORDS.split(), "--data", str(data)]
            foreseen = foresee(words, arguments.ranks, folder / f"turn{number}")
            took, trained = timed(words, arguments.ranks, folder / f"run{number}")
            turns.append(judged(foreseen, took, trained))
            print(json.dumps(turns[-1]), file=sys.stderr, flush=True)
    given = list(sys.argv[1:] if argv is None else argv)
    result = {
        "command": " ".join(["python -m benchmarks.cost.dry_run", *given]),
        "options": WORDS,
        "machine": machine(),
    }
    result |= {"load_average_at_the_end": round(os.getloadavg()[0], 1), "ranks": arguments.ranks, "turns": turns}
    result["median_time_ratio"] = statistics.median(turn["time_ratio"] for turn in turns)
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(as_markdown(result))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost.dry_run", description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, help="ranks on this machine (default 2)")
    parser.add_argument("--turns", type=int, default=3, help="dry runs, each with its run (default 3)")
    parser.add_argument("--folder", type=Path, help="where data and runs are made (default: the temporary folder)")
    parser.add_argument("--output", type=Path, help="write the figures as JSON here")
    return parser.parse_args(argv)


def foresee(words: Sequence[str], ranks: int, output: Path) -> dict[str, Any]:
    """What a dry run of these options says, as its JSON has it."""
    timed([*words, "--dry-run-steps", str(STEPS), "--json"], ranks, output)
    printed = Path(f"{output}.txt").read_text(encoding="utf-8")
    found, _ = json.JSONDecoder().raw_decode(printed, printed.index("\n{\n") + 1)
    return found


def timed(words: Sequence[str], ranks: int, output: Path) -> tuple[float, Trained]:
    """Wall-clock seconds of all ranks from start to end, and what they took."""
    began = time.perf_counter()
    (trained,) = finish([Run(words, ranks, output)])
    return time.perf_counter() - began, trained


def judged(foreseen: dict[str, Any], took: float, trained: Trained) -> dict[str, Any]:
    """Foreseen against measured; a ratio is foreseen over measured."""
    expected = foreseen["time"]
    planned = next(one["bytes_of_a_rank"] for one in foreseen["memory"] if one["set_up"])
    measured = max(trained.peak_bytes)
    return {
        "seconds": {"foreseen": round(expected["total_seconds"], 1), "measured": round(took, 1)},
        "time_ratio": round(expected["total_seconds"] / took, 3),
        "seconds_by_part_foreseen": {name: round(value, 2) for name, value in expected["seconds"].items()},
        "step_seconds": {
            "foreseen": round(expected["step_seconds"], 4),
            "measured": round(statistics.mean(trained.step_seconds[2:]), 4),
        },
        "memory_bytes": {"planned": planned, "measured": measured, "of_the_dry_run": expected["peak_bytes"]},
        "memory_ratio": round(planned / measured, 3),
    }


def as_markdown(result: dict[str, Any]) -> str:
    """A table of foreseen and measured."""
    rows = [
        "| turn | seconds: foreseen, measured | ratio | memory: planned, measured, MB | ratio |",
        "|---|---|---|---|---|",
    ]
    for number, turn in enumerate(result["turns"], 1):
        seconds, memory = turn["seconds"], turn["memory_bytes"]
        rows.append(
            f"| {number} | {seconds['foreseen']:.0f}, {seconds['measured']:.0f} | {turn['time_ratio']:.2f}"
            f" | {memory['planned'] / 1e6:.0f}, {memory['measured'] / 1e6:.0f} | {turn['memory_ratio']:.2f} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
