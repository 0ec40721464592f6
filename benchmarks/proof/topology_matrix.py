"""Saves a run on every topology and continues each in every other: {1, 2, 4 ranks} x ZeRO {0, 1, 2, 3}, on CPU.

    python -m benchmarks.proof.topology_matrix [--precision fp32 bf16] [--output FILE]

A stand-in model with dropout trains 5 steps and is saved; every cell loads every checkpoint into an engine that has
already stepped. Compared with the run that wrote it: fp32 weights and both moments, bit for bit; the samples of the
next steps; their losses. Then the training program itself, under the real launcher, with the tiny FLM. bf16 has no
stage 0 (refused, see pipeline/deepspeed_json/ds_config.py), fp16 does not run on a CPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.proof.kill_test import prepare_data
from benchmarks.proof.killed_launch import Launcher
from benchmarks.proof.same_run import read_lines
from pipeline.checkpoint import restore
from pipeline.checkpoint.saver import Saver
from pipeline.checkpoint.state import RunState
from pipeline.config.options import Config
from pipeline.data.order import SampleOrder
from pipeline.loading.batch_positions import TrainBatches
from pipeline.recording.environment import describe_environment
from pipeline.recording.sample_keys import read_sample_keys
from tests.forked_ranks import run_ranks
from tests.pipeline.engine.test_engine import global_loss, make_engine, tiny_config
from tests.tiny_objective import TinyObjective, tiny_batch

REPOSITORY = Path(__file__).resolve().parents[2]
RANKS = (1, 2, 4)
STAGES = {"fp32": (0, 1, 2, 3), "bf16": (1, 2, 3)}
SAVED_AT, STEPS = 5, 8
CORPUS_SIZE = 37  # the epoch ends within the run
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}


@dataclass
class Part:
    """What some steps of a run did: keys of each step in the global order, losses, and its state before them."""

    keys: list[list[str]]
    losses: list[float]
    state: dict[str, str]  # "kind name" -> SHA-256 of the fp32 values


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=list(STAGES))
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks" / "results" / "topology_matrix.json")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"environment": describe_environment(torch.device("cpu"))}
    for precision in arguments.precision:
        with tempfile.TemporaryDirectory() as folder:
            results[precision] = compare(*run_matrix(Path(folder), precision), TOLERANCE[precision])
        print(table(results[precision]), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        results["program"] = through_the_program(Path(folder))
    print(results["program"], flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    return 1 if any(results[part]["faults"] for part in [*arguments.precision, "program"]) else 0


def run_matrix(
    folder: Path, precision: str, ranks: Sequence[int] = RANKS, stages: Sequence[int] | None = None
) -> tuple[dict[str, Part], dict[str, dict[str, Part]]]:
    """({cell: its own steps after the save}, {saved in: {continued in: the same steps there}})."""
    config = tiny_config(steps=STEPS, precision=precision)
    stages = stages or STAGES[precision]
    own: dict[str, Part] = {}
    for world in ranks:
        own |= run_ranks(world, save_in_every_stage, config, stages, folder)[0]
    continued: dict[str, dict[str, Part]] = {name: {} for name in own}
    for world in ranks:
        for name, parts in run_ranks(world, continue_in_every_stage, config, stages, folder, list(own))[0].items():
            continued[name] |= parts
    return own, continued


def save_in_every_stage(place, config: Config, stages: Iterable[int], folder: Path) -> dict[str, Part]:
    """What one rank does: train, save and train on, once per stage."""
    found = {}
    for stage in stages:
        engine, agreement = make_engine(place, config, stage, lambda: TinyObjective(0.3))
        train(place, config, engine, agreement, 0, SAVED_AT)
        state = fingerprint(engine)
        run = folder / cell(place.world_size, stage)
        saver = Saver(run, engine, config.train, place, agreement)
        assert saver.save(RunState(step=SAVED_AT)) and saver.wait()
        found[run.name] = Part(*train(place, config, engine, agreement, SAVED_AT, STEPS), state)
    return found


def continue_in_every_stage(
    place, config: Config, stages: Iterable[int], folder: Path, saved: Sequence[str]
) -> dict[str, dict[str, Part]]:
    """What one rank does: load every checkpoint in turn into one engine per stage, and train on."""
    found: dict[str, dict[str, Part]] = {name: {} for name in saved}
    for stage in stages:
        engine, agreement = make_engine(place, config, stage, lambda: TinyObjective(0.3))
        for name in saved:
            state = restore.resume(folder / name, engine, agreement, place.is_main)
            tensors = fingerprint(engine)
            part = Part(*train(place, config, engine, agreement, state.step, STEPS), tensors)
            found[name][cell(place.world_size, stage)] = part
    return found


def train(place, config: Config, engine, agreement, start: int, stop: int) -> tuple[list[list[str]], list[float]]:
    """Keys of each step in the global order, and its loss; samples come by the training order of the real loader."""
    order = SampleOrder([CORPUS_SIZE], config.train.seed)
    size, turns = config.optim.micro_batch_size, engine.accumulation
    batches = iter(TrainBatches(start, stop, place.rank, place.world_size, size, turns))
    keys, losses = [], []
    for step in range(start, stop):
        samples = [order.at_many(next(batches))[1].tolist() for _ in range(turns)]
        micro_batches = [tiny_batch(indices) for indices in samples]
        losses.append(global_loss(engine, agreement, engine.step(step, micro_batches)))
        of_ranks = agreement.gather([batch.keys for batch in micro_batches])
        keys.append([key for turn in zip(*of_ranks, strict=True) for part in turn for key in part])
    return keys, losses


def fingerprint(engine) -> dict[str, str]:
    """SHA-256 of every fp32 weight and moment that the engine holds, read back from DeepSpeed."""
    return {
        f"{kind} {name}": hashlib.sha256(tensor.float().numpy().tobytes()).hexdigest()
        for name, tensors in engine.named_state()
        for kind, tensor in tensors.items()
    }


def cell(world_size: int, stage: int) -> str:
    return f"{world_size} x ZeRO {stage}"


def compare(own: dict[str, Part], continued: dict[str, dict[str, Part]], tolerance: float) -> dict[str, Any]:
    """Largest difference of a loss for each pair of cells, and every fault in words."""
    largest: dict[str, dict[str, float]] = {}
    faults = []
    first = next(iter(own.values()))
    for name, expected in own.items():
        if expected.keys != first.keys:
            faults.append(f"{name}: another sample order than the first cell")
        largest[name] = {}
        for target, found in continued[name].items():
            difference = max(abs(a - b) for a, b in zip(expected.losses, found.losses, strict=True))
            largest[name][target] = difference
            if found.state != expected.state:
                wrong = [key for key in expected.state if found.state.get(key) != expected.state[key]]
                faults.append(f"{name} -> {target}: {len(wrong)} tensors differ, first {wrong[:1]}")
            if found.keys != expected.keys:
                faults.append(f"{name} -> {target}: other samples")
            if not difference <= tolerance:
                faults.append(f"{name} -> {target}: losses {found.losses}, expected {expected.losses}")
    between = max(
        abs(a - b) for part in own.values() for a, b in zip(part.losses, first.losses, strict=True)
    )  # without any checkpoint
    return {
        "saved_at": SAVED_AT,
        "steps_compared": STEPS - SAVED_AT,
        "tolerance": tolerance,
        "tensors_per_checkpoint": len(first.state),
        "loss_at_save": first.losses[0],
        "largest_loss_difference": largest,
        "largest_loss_difference_between_uninterrupted_runs": between,
        "faults": faults,
    }


PARTS = ((2, 2, 4), (1, 3, 8), (4, 1, 12))  # ranks, ZeRO stage, last step
PROGRAM = {
    "--recipe": "flm_tiny",
    "--train.precision": "fp32",
    "--train.log_every": 1,
    "--train.eval_every": 4,
    "--optim.schedule": "constant",  # so that the last step of a part does not shape the steps before it
    "--optim.warmup_fraction": 0,
    "--tracking.sample_keys": "true",
    "--tracking.report": "false",
    "--tracking.tensorboard": "false",
}


def through_the_program(folder: Path) -> dict[str, Any]:
    """One run in three parts on three topologies, and the same run on 2 ranks, by `deepspeed pipeline/train.py`."""
    prepare_data(folder)
    for run, parts in (("whole", [(2, 2, PARTS[-1][2])]), ("parts", PARTS)):
        for ranks, stage, steps in parts:
            script = ["--deepspeed", REPOSITORY / "ds_configs" / f"zero{stage}.json", "--train.steps", steps]
            words = [
                REPOSITORY / "pipeline" / "train.py",
                *script,
                *(word for pair in PROGRAM.items() for word in pair),
            ]
            Launcher(folder, [str(word) for word in words], steps, ranks).finish(folder / run)
    return compare_program(folder / "whole", folder / "parts")


def compare_program(whole: Path, parts: Path) -> dict[str, Any]:
    """Sample keys of every step, and the losses: those next after a change of topology, and all."""
    losses = [
        {r["step"]: r["loss"] for r in read_lines(run / "log.jsonl") if r["kind"] == "train"} for run in (whole, parts)
    ]
    difference = {step: abs(losses[1][step] - loss) for step, loss in losses[0].items()}
    after = max(difference[steps + 1] for _, _, steps in PARTS[:-1])
    faults = [] if read_sample_keys(whole) == read_sample_keys(parts) else ["other samples"]
    faults += [] if after <= TOLERANCE["fp32"] else [f"losses next after a change differ by {after}"]
    return {
        "parts": [f"{cell(ranks, stage)} to step {steps}" for ranks, stage, steps in PARTS],
        "next_losses_differ_by": after,
        "all_losses_differ_by": max(difference.values()),
        "faults": faults,
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: rows saved in, columns continued in."""
    differences = result["largest_loss_difference"]
    columns = list(differences)
    lines = [["saved in \\ continued in", *columns], ["---"] * (len(columns) + 1)]
    lines += [
        [name, *(f"{row[target]:.0e}" if row[target] else "0" for target in columns)]
        for name, row in differences.items()
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
