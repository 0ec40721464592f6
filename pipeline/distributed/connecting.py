"""Connects this rank to the others, once they have met, and says once what concerns all of them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch

from pipeline.distributed.devices import choose_device, refuse_shared_gpu
from pipeline.distributed.places import Place
from pipeline.distributed.preempt import StopRequest
from pipeline.distributed.ranks import Agreement
from pipeline.distributed.rendezvous import Meeting, connect


@dataclass(frozen=True)
class Ranks:
    """This rank among the others, and what they agree by."""

    place: Place
    device: torch.device
    agreement: Agreement
    stop: StopRequest
    threads: Mapping[str, Any] = field(default_factory=dict)  # how this rank shares the cores of its host, on record

    def say(self, line: str, error: bool = False) -> None:
        """Print a line once, on the main rank."""
        if self.place.is_main:
            print(line, file=sys.stderr if error else sys.stdout, flush=True)


def connect_ranks(
    place: Place,
    stop: StopRequest,
    meeting: Meeting,
    own_address: str | None,
    silence: timedelta,
    device: torch.device | None = None,
) -> Ranks:
    """Choose the device, unless one is given, and connect the ranks; every rank must call it.

    Raises:
        ValueError: a rank has no device of its own.
    """
    if device is None:
        place, device = choose_device(place)
    connect(place, device, meeting, own_address, silence)
    agreement = Agreement(silence)
    refuse_shared_gpu(place, device, agreement)
    return Ranks(place, device, agreement, stop)
