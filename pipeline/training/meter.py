"""Turns steps into the numbers of a log line: losses, speed, waiting, memory, utilisation."""

from __future__ import annotations

import math
import resource
import statistics
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from model.batch import Batch
from pipeline.distributed.ranks import Agreement
from pipeline.engine.engine import StepResult, TrainEngine
from pipeline.engine.peak_flops import peak_flops

GIB = float(1 << 30)
GFLOP = 1e9


class StepMeter:
    """Accumulates steps between two log lines without waiting for the device; ``read`` waits once."""

    def __init__(self, term_weights: Mapping[str, float], agreement: Agreement, device: torch.device, precision: str):
        self._weights, self._agreement, self._device = dict(term_weights), agreement, device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self._peak_flops = peak_flops(name, precision)
        self.restart()

    def restart(self) -> None:
        """Start counting anew, for example after an evaluation whose time is not training's."""
        self._began = time.perf_counter()
        self._waited = self._flops = 0.0
        self._samples = self._steps = 0
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._last: StepResult | None = None

    def add(self, result: StepResult, batches: Sequence[Batch], waited_seconds: float, flops: float) -> None:
        """``waited_seconds`` is what this rank waited for data, ``flops`` what its batches cost (0 if unknown)."""
        taken = result.taken  # the losses of a step that was not taken would drown those of the others
        for name, value in result.loss_sums.items() if taken else ():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        for name, count in result.counts.items() if taken else ():
            self._counts[name] = self._counts.get(name, 0) + count
        self._waited += waited_seconds
        self._flops += flops
        self._samples += sum(batch.images.shape[0] for batch in batches)
        self._steps += 1
        self._last = result

    def is_finite(self) -> bool:
        """Whether every loss since the last reading is finite on every rank (waits for the device)."""
        bad = sum(not math.isfinite(float(value)) for value in self._sums.values())
        return self._agreement.total([bad])[0] == 0

    def read(self, engine: TrainEngine) -> dict[str, float]:
        """The values of one log line, equal on every rank, and a restart; every rank must call it."""
        names = sorted(self._weights)
        sums = [float(self._sums[name]) if name in self._sums else 0.0 for name in names]  # waits for the device
        seconds = time.perf_counter() - self._began
        own = [*sums, self._samples, self._flops]
        table = self._of_ranks(self._waited / max(self._steps, 1), engine.forward_timer.take() / max(self._steps, 1))
        totals = self._agreement.total([*own, *table])
        *sums, samples, flops = totals[: len(own)]
        data_waits, forwards = totals[len(own) :: 2], totals[len(own) + 1 :: 2]
        ranks = len(data_waits)
        means = {name: total / self._counts[name] for name, total in zip(names, sums) if self._counts.get(name)}
        targets = sum(self._counts.values())
        grad_norm = None if self._last is None else self._last.grad_norm
        values = {"loss": sum(self._weights[name] * mean for name, mean in means.items()) if means else math.nan}
        values |= {f"{name}_loss": mean for name, mean in means.items()}
        values["learning_rate"] = 0.0 if self._last is None else self._last.learning_rate
        if grad_norm is not None:
            values["grad_norm"] = float(grad_norm)
        values |= {
            "samples_per_second": samples / seconds,
            "predicted_tokens_per_second": targets / seconds,
            "step_seconds": seconds / max(self._steps, 1),
            "data_wait_share": sum(data_waits) * self._steps / ranks / seconds,
            "peak_memory_gib": self._agreement.largest(peak_memory_bytes(self._device) / GIB),
        }
        if samples and flops:
            values["gflop_per_sample"] = flops / samples / GFLOP
        if self._peak_flops is not None and flops:
            values["mfu"] = flops / seconds / ranks / self._peak_flops
        if ranks > 1:
            values |= _of_slowest("data_wait", data_waits) | _of_slowest("forward", forwards)
        values["skipped_steps"] = float(engine.skipped_steps)
        self.restart()
        return values

    def _of_ranks(self, *numbers: float) -> list[float]:
        """The numbers of this rank in the table of all ranks, so that one sum over ranks fills it."""
        rank, width = self._agreement.rank, len(numbers)
        table = [0.0] * (width * self._agreement.world_size)
        table[width * rank : width * (rank + 1)] = numbers
        return table


def _of_slowest(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """Seconds a step of the middle rank and of the slowest one, and which that is."""
    slowest = max(seconds)
    return {
        f"{name}_seconds": statistics.median(seconds),
        f"slowest_{name}_seconds": slowest,
        f"slowest_{name}_rank": seconds.index(slowest),
    }


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory in use so far: allocated by torch on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
