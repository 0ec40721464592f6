"""Which device a rank computes on, whether its launcher shows it all GPUs of the node or its own alone."""

from __future__ import annotations

import dataclasses

import torch

from pipeline.distributed.endings import host_name
from pipeline.distributed.places import Place
from pipeline.distributed.ranks import Agreement


def choose_device(place: Place) -> tuple[Place, torch.device]:
    """This rank's GPU, or the CPU where there is none; the place with the number of that GPU.

    Raises:
        ValueError: more ranks on this node than GPUs that they see.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        return place, torch.device("cpu")
    local_rank = 0 if count == 1 else place.local_rank  # a GPU binding shows each task its own, as number 0
    if local_rank >= count:
        raise ValueError(f"local rank {local_rank} has no GPU, {count} visible; start at most {count} ranks per node")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return dataclasses.replace(place, local_rank=local_rank), device


def refuse_shared_gpu(place: Place, device: torch.device, agreement: Agreement) -> None:
    """Raise ValueError on every rank when two ranks compute on one GPU; every rank must call it."""
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
    refuse_twice(agreement.gather((host_name(), gpu)))


def refuse_twice(found: list[tuple[str, str | None]]) -> None:
    """Raise ValueError when two entries (host, GPU), by rank, are the same GPU."""
    first: dict[str, int] = {}
    for rank, (host, gpu) in enumerate(found):
        if gpu is not None and first.setdefault(gpu, rank) != rank:
            raise ValueError(
                f"ranks {first[gpu]} and {rank} on {host} compute on one GPU ({gpu}); start one rank per GPU, or let "
                "the launcher show each rank its own (srun --gpus-per-task=1 --gpu-bind=per_task:1)"
            )
