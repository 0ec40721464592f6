"""A plan as text for people and as plain values for JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from model.census import in_millions
from pipeline.config.command_line import Launch
from pipeline.planning.configurations import Configuration
from pipeline.planning.counts import Parameters
from pipeline.planning.memory import Memory
from pipeline.planning.speed import Machine, checkpoint_of

GIB = 1 << 30


@dataclass(frozen=True)
class Subject:
    """What is planned: a run, its vocabulary in words, and the machines it is to run on."""

    launch: Launch
    vocabulary: str
    parameters: Parameters
    gpus: int
    gpu_memory_gib: float
    machine: Machine


def as_text(subject: Subject, best: Configuration, shown: Sequence[Configuration]) -> str:
    """A table of the configurations ``shown``, and what the best costs."""
    parameters, machine, config = subject.parameters, subject.machine, subject.launch.config
    frozen = f", {in_millions(parameters.frozen)} frozen" if parameters.frozen else ""
    nodes = -(-subject.gpus // machine.ranks_per_node)
    head = (
        f"recipe {subject.launch.recipe}: {in_millions(parameters.trained)} parameters trained{frozen}"
        f" ({subject.vocabulary}); batch {config.optim.batch_size} on {subject.gpus} GPUs of"
        f" {subject.gpu_memory_gib:g} GiB, {nodes} node{'s' if nodes > 1 else ''}"
    )
    titles = f"  {'deepspeed':<20}{'precision':<11}{'micro-batch':<13}{'checkpointing':<15}"
    titles += f"{'GiB':>7}{'s/step':>9}{'samples/s':>11}"
    rows = [_row(one, is_best=one.choice == best.choice) for one in shown]
    return "\n".join([head, "", titles, *rows, "", *_costs(subject, best)])


def _row(one: Configuration, is_best: bool) -> str:
    choice, speed = one.choice, one.speed
    size = f"{choice.micro_batch_size} x {choice.accumulation}"
    row = f"{'* ' if is_best else '  '}{choice.deepspeed:<20}{choice.precision:<11}{size:<13}"
    row += f"{'on' if choice.recomputes else 'off':<15}{one.memory.peak / GIB:>7.1f}"
    return row + (f"{speed.step_seconds:>9.3f}{speed.samples_per_second:>11,.0f}" if one.fits else "  does not fit")


def _costs(subject: Subject, best: Configuration) -> list[str]:
    """The best configuration in lines: how to run it, its memory, its step, data and checkpoints."""
    machine, train = subject.machine, subject.launch.config.train
    choice, memory, speed = best.choice, best.memory, best.speed
    num_bytes, seconds, stall = checkpoint_of(subject.parameters, machine, subject.gpus)
    lines = [
        f"fits best (*): --deepspeed ds_configs/{choice.deepspeed} --optim.micro_batch_size {choice.micro_batch_size}"
        f" --model.activation_checkpointing {str(choice.recomputes).lower()}",
        f"memory of a GPU in {memory.moment}, GiB: {in_gib(parts_of(memory))}",
        f"memory of its node for each GPU, GiB: {in_gib(memory.host)}",
        f"a step: {speed.compute:.3f} s forward and backward, {speed.communication:.3f} s communication"
        f" ({speed.network_bytes / 1e9:.2f} GB sent by a GPU), {speed.optimizer:.3f} s optimizer, {speed.other:.3f} s"
        f" other; weak scaling {speed.efficiency:.0%}, {speed.model_flops / 1e12:.0f} TFLOP/s of the model a GPU",
        f"data: {speed.read_bandwidth / 1e6:,.0f} MB/s for all, {speed.cores_needed:.1f} CPU cores a GPU",
        f"checkpoint: {num_bytes / 1e9:.1f} GB, {seconds:.0f} s to disk, training waits {stall:.1f} s",
    ]
    if speed.cores_needed > machine.cores_per_rank:
        lines[4] += f"; there are {machine.cores_per_rank}: loading is the limit, and the step takes longer"
    if train.epochs is None:
        hours = train.steps * speed.step_seconds / 3600
        lines.append(
            f"the run: {train.steps:,} steps, {f'{hours / 24:.1f} days' if hours > 48 else f'{hours:.1f} hours'}"
        )
    return [*lines, "a GPU's memory and time are a model with stated constants, not measured ones: docs/scaling.md"]


def parts_of(memory: Memory) -> dict[str, int]:
    """Bytes of a device by part at the moment when most is held."""
    parts = {"libraries": memory.platform.base, **memory.held}
    for name, size in memory.moments[memory.moment].items():
        parts[name] = parts.get(name, 0) + size
    return {**parts, "lost by the allocator": memory.peak - sum(parts.values())}


def in_gib(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)


def as_plain(subject: Subject, best: Configuration, shown: Sequence[Configuration]) -> dict[str, Any]:
    """Numbers and strings, in bytes and seconds."""
    parameters, machine, config = subject.parameters, subject.machine, subject.launch.config
    num_bytes, seconds, stall = checkpoint_of(parameters, machine, subject.gpus)
    return {
        "recipe": subject.launch.recipe,
        "gpus": subject.gpus,
        "gpu_memory_gib": subject.gpu_memory_gib,
        "parameters": {"trained": parameters.trained, "frozen": parameters.frozen},
        "batch_size": config.optim.batch_size,
        "best": _plain(best),
        "steps": None if config.train.epochs else config.train.steps,
        "checkpoint": {"bytes": num_bytes, "seconds": seconds, "stall_seconds": stall},
        "configurations": [_plain(one) for one in shown],
        "machine": dataclasses.asdict(machine),
    }


def _plain(one: Configuration) -> dict[str, Any]:
    choice, speed = one.choice, one.speed
    offloads = {"optimizer": choice.zero.offload_optimizer, "weights": choice.zero.offload_weights}
    return {
        "fits": one.fits,
        "deepspeed": choice.deepspeed,
        "zero_stage": choice.zero.stage,
        "precision": choice.precision,
        "micro_batch_size": choice.micro_batch_size,
        "accumulation": choice.accumulation,
        "activation_checkpointing": choice.recomputes,
        "offloaded": [name for name, on in offloads.items() if on],
        "memory_bytes": one.memory.peak,
        "moment": one.memory.moment,
        "memory_by_part": parts_of(one.memory),
        "host_memory_by_part": dict(one.memory.host),
        "step_seconds": speed.step_seconds,
        "seconds": {
            "compute": speed.compute,
            "communication": speed.communication,
            "optimizer": speed.optimizer,
            "other": speed.other,
        },
        "samples_per_second": speed.samples_per_second,
        "weak_scaling": speed.efficiency,
        "model_flops_per_second": speed.model_flops,
        "network_bytes": speed.network_bytes,
        "loader_cores": speed.cores_needed,
        "read_bytes_per_second": speed.read_bandwidth,
    }
