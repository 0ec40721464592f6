"""Bytes of a rank at each ZeRO stage, and the speed of a step, by the planner."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from model.config import Vocabulary
from pipeline.config.options import Config, ConfigError
from pipeline.deepspeed_json.ds_config import Device, resolve
from pipeline.dry_run.counting import counted, valueless
from pipeline.dry_run.device_found import FoundDevice
from pipeline.planning.counts import Parameters, Work, count_parameters
from pipeline.planning.memory import CPU, CUDA, HEAP_BLOCK, Memory, memory_of, zero_of
from pipeline.planning.speed import Machine, Speed, demands_of, speed_of

REACHED = 0.45  # share of a GPU's peak rate, as the planner assumes


@dataclass(frozen=True)
class Stage:
    """A ZeRO stage: what a rank holds, and a step's time where the device's rates are known; or why it is refused."""

    stage: int
    precision: str = ""
    accumulation: int = 0
    memory: Memory | None = None
    speed: Speed | None = None
    fits: bool | None = None  # None where the device's memory is unknown
    refused: str | None = None


class Counts:
    """What is counted of a run's model, once for each precision."""

    def __init__(self, config: Config, vocabulary: Vocabulary, device: FoundDevice, text_tokens: float) -> None:
        """Raises ValueError for a model that cannot be built, or a step that cannot be counted."""
        self._config, self._vocabulary, self._device, self._text_tokens = config, vocabulary, device, text_tokens
        self.objective, self.work = cache(self._objective), cache(self._work)
        self.parameters: Parameters = count_parameters(self.objective("fp32"))

    def _objective(self, precision: str) -> nn.Module:
        return valueless(self._config, self._vocabulary, precision)

    def _work(self, precision: str) -> Work:
        large = HEAP_BLOCK if self._device.kind == "cpu" else 1 << 62
        size = self._config.optim.micro_batch_size
        return counted(self.objective(precision), self._config, size, self._text_tokens, self._device.kind, large)


def stages_of(counts: Counts, given: Mapping[str, Any], config: Config, ranks: int, device: FoundDevice) -> list[Stage]:
    """What the four stages hold, all else as in the DeepSpeed JSON that is ``given``."""
    return [_stage(stage, counts, given, config, ranks, device) for stage in range(4)]


def _stage(
    stage: int,
    counts: Counts,
    given: Mapping[str, Any],
    config: Config,
    ranks: int,
    device: FoundDevice,
) -> Stage:
    try:
        resolved = resolve(_at_stage(given, stage), config, ranks, Device(device.kind, device.has_bf16))
    except ConfigError as error:
        return Stage(stage, refused=str(error))
    precision = next((name for name in ("bf16", "fp16") if resolved[name]["enabled"]), "fp32")
    zero, steps, work = zero_of(resolved), resolved["gradient_accumulation_steps"], counts.work(precision)
    waiting = work.image_bytes * (config.data.prefetch + 2) * config.data.num_workers if device.kind == "cpu" else 0
    platform = CPU if device.kind == "cpu" else CUDA
    memory = memory_of(
        counts.parameters, work.activations, zero, ranks, steps, platform, config.train.async_save, waiting
    )
    speed = None
    if precision in device.peak_flops:
        machine = machine_of(device, precision)
        speed = speed_of(demands_of(counts.parameters, work, zero, ranks, steps), machine, work, ranks, steps)
    fits = None if device.memory_bytes is None else memory.peak <= device.memory_bytes
    return Stage(stage, precision, steps, memory, speed, fits)


def _at_stage(given: Mapping[str, Any], stage: int) -> dict[str, Any]:
    """The JSON with another stage, without what that stage cannot offload."""
    changed = copy.deepcopy(dict(given))
    zero = dict(changed.get("zero_optimization") or {})
    for name, least in (("offload_optimizer", 1), ("offload_param", 3)):
        if stage < least:
            zero.pop(name, None)
    changed["zero_optimization"] = zero | {"stage": stage}
    return changed


def machine_of(device: FoundDevice, precision: str) -> Machine:
    """The planner's machine with the rate of the GPU that is here; its other constants are assumptions."""
    return dataclasses.replace(
        Machine(), flops=REACHED * device.peak_flops[precision], ranks_per_node=device.ranks_on_node
    )
