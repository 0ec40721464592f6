"""The device that a rank would compute on, as far as it can be told without touching it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.distributed.host_memory import available_bytes
from pipeline.distributed.places import Place
from pipeline.engine.peak_flops import peak_flops
from pipeline.planning.activations import DeviceKind
from pipeline.recording.environment import device_name


@dataclass(frozen=True)
class FoundDevice:
    """``memory_bytes`` is what one rank may have: all of a GPU, its share of what a machine has free; None: unknown."""

    kind: DeviceKind
    name: str
    memory_bytes: int | None
    ranks_on_node: int
    has_bf16: bool
    peak_flops: dict[str, float]  # per second, by precision; empty where it is not known

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.kind)


def find_device(place: Place) -> FoundDevice:
    """The device of this rank. A GPU is asked for its properties, which allocates nothing on it."""
    ranks = place.local_world_size or place.world_size
    if not torch.cuda.is_available():
        free = available_bytes()
        return FoundDevice("cpu", device_name(torch.device("cpu")), free and free // ranks, ranks, True, {})
    number = 0 if torch.cuda.device_count() == 1 else min(place.local_rank, torch.cuda.device_count() - 1)
    found = torch.cuda.get_device_properties(number)
    rates = {precision: peak_flops(found.name, precision) for precision in ("bf16", "fp16", "fp32")}
    known = {name: rate for name, rate in rates.items() if rate}
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return FoundDevice("cuda", found.name, found.total_memory, ranks, has_bf16, known)
