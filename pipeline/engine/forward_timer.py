"""How long this rank's own forward passes take, measured without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class ForwardTimer:
    """Adds up forward passes, which wait for no other rank but at ZeRO-3: a rank that takes longer is itself slow."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu, self._seconds = device.type == "cuda", 0.0
        self._events: list[tuple[Any, Any]] = []

    @contextmanager
    def measure(self) -> Iterator[None]:
        """What runs inside is added; on a GPU by events of its stream, read later."""
        if self._on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    def take(self) -> float:
        """Seconds since the last call; waits for the device to be done with them."""
        seconds, self._seconds = self._seconds, 0.0
        events, self._events = self._events, []
        for begin, end in events:
            end.synchronize()
            seconds += begin.elapsed_time(end) / 1000
        return seconds
