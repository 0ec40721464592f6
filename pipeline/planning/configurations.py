"""Which configurations of a run fit a device, and which of them is fastest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from pipeline.config.options import ConfigError
from pipeline.planning.activations import Activations
from pipeline.planning.counts import Parameters, Work
from pipeline.planning.memory import CUDA, Memory, Platform, Zero, memory_of
from pipeline.planning.speed import Machine, Speed, demands_of, speed_of

LARGEST_MICRO_BATCH = 1024


@dataclass(frozen=True)
class Choice:
    """What a plan chooses: a DeepSpeed JSON and the precision it gives, the micro-batch, activation checkpointing."""

    deepspeed: str
    precision: str
    zero: Zero
    micro_batch_size: int
    accumulation: int
    recomputes: bool


@dataclass(frozen=True)
class Configuration:
    """A choice with what it costs; ``fits`` the memory of the device."""

    choice: Choice
    memory: Memory
    speed: Speed
    fits: bool


def micro_batch_sizes(batch_size: int, ranks: int) -> list[int]:
    """Sizes that divide a rank's share of the batch, each at least twice the one before.

    Raises:
        ConfigError: the ranks do not divide the batch.
    """
    share, remainder = divmod(batch_size, ranks)
    if remainder or not share:
        lower = max(batch_size // ranks, 1) * ranks
        raise ConfigError(
            f"optim.batch_size {batch_size} is not a multiple of {ranks} GPUs; use --optim.batch_size {lower} or"
            f" {lower + ranks}, or --gpus {_divisor(batch_size, ranks)}"
        )
    sizes: list[int] = []
    for size in range(1, min(share, LARGEST_MICRO_BATCH) + 1):
        if share % size == 0 and (not sizes or size >= 2 * sizes[-1]):
            sizes.append(size)
    return sizes


def _divisor(number: int, at_most: int) -> int:
    return next(one for one in range(min(at_most, number), 0, -1) if number % one == 0)


def between(low: Work, high: Work, samples: int) -> Work:
    """The work of a micro-batch of ``samples``, on the line through those of two others."""
    if low.samples == high.samples:
        assert samples == low.samples, (samples, low.samples)
        return low
    share = (samples - low.samples) / (high.samples - low.samples)

    def along(name: str, one: Any, other: Any) -> Any:
        value = getattr(one, name) + share * (getattr(other, name) - getattr(one, name))
        return max(0, round(value))

    counts = {item.name: along(item.name, low.activations, high.activations) for item in fields(Activations)}
    numbers = {name: along(name, low, high) for name in ("tokens", "flops", "recomputed_flops", "image_bytes")}
    return Work(samples=samples, activations=Activations(**counts), **numbers)


def in_fp32(work: Work) -> Work:
    """At most what a micro-batch takes in fp32, from one in half precision: twice the bytes."""
    bytes_of = ("kept", "peak", "peak_with_gradients", "small_peak", "large_peak", "traffic")
    doubled = {name: 2 * getattr(work.activations, name) for name in bytes_of}
    return replace(work, activations=replace(work.activations, **doubled))


def configurations(
    choices: Sequence[Choice],
    parameters: Parameters,
    work_of: Callable[[Choice], Work],
    ranks: int,
    memory_bytes: int,
    machine: Machine,
    platform: Platform = CUDA,
    host_bytes: int | None = None,
    async_save: bool = True,
) -> list[Configuration]:
    """Each choice with what it costs on ``ranks`` devices of ``memory_bytes``; nodes have ``host_bytes`` if known."""
    result = []
    for choice in choices:
        work = work_of(choice)
        memory = memory_of(parameters, work.activations, choice.zero, ranks, choice.accumulation, platform, async_save)
        rate = machine.fp32_flops if choice.precision == "fp32" else machine.flops
        demands = demands_of(parameters, work, choice.zero, ranks, choice.accumulation, machine.kind)
        speed = speed_of(demands, replace(machine, flops=rate), work, ranks, choice.accumulation)
        on_node = sum(memory.host.values()) * min(ranks, machine.ranks_per_node)
        fits = memory.peak <= memory_bytes and (host_bytes is None or on_node <= host_bytes)
        result.append(Configuration(choice, memory, speed, fits))
    return result


def fastest(found: Sequence[Configuration]) -> Configuration | None:
    """Of those that fit, the one with most samples a second; of equally fast ones, which holds least."""
    fitting = [one for one in found if one.fits]
    return max(fitting, key=lambda one: (one.speed.samples_per_second, -one.memory.peak), default=None)


def smallest(found: Sequence[Configuration]) -> Configuration:
    """The one that holds least."""
    return min(found, key=lambda one: one.memory.peak)


def largest_by_kind(found: Sequence[Configuration]) -> list[Configuration]:
    """For each DeepSpeed JSON, with and without checkpointing: the fastest that fits, else the smallest there is."""
    kinds: dict[tuple[str, bool], list[Configuration]] = {}
    for one in found:
        kinds.setdefault((one.choice.deepspeed, one.choice.recomputes), []).append(one)
    return [fastest(group) or smallest(group) for group in kinds.values()]
