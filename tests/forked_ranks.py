"""Runs a function on several gloo ranks, forked from this warm process, and hands back what each returned."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from typing import Any

import torch

from pipeline.distributed.endings import leave
from pipeline.distributed.launching import reserve_port
from pipeline.distributed.places import Place
from pipeline.distributed.rendezvous import connect

TIMEOUT_SECONDS = 100


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``function(place, *arguments)`` on every rank; raises RuntimeError with the traceback of a rank that failed."""
    workers, pipes = start_ranks(world_size, function, *arguments)
    results: list[Any] = []
    try:
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(TIMEOUT_SECONDS):
                raise RuntimeError(f"rank {rank} said nothing for {TIMEOUT_SECONDS} s")
            kind, value = pipe.recv()
            if kind == "error":
                raise RuntimeError(f"rank {rank} failed:\n{value}")
            results.append(value)
    finally:
        for worker in workers:
            worker.join(timeout=5 if len(results) == world_size else 0.5)
            if worker.is_alive():
                worker.kill()
                worker.join()
    return results


def start_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> tuple[list, list]:
    """The processes that run ``function``, one per rank, and the pipes they answer by."""
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401  with torch's compiler, imported here for every fork

    context = multiprocessing.get_context("fork")
    listening, variables = reserve_port()
    pipes, workers = [], []
    for rank in range(world_size):
        receive, send = context.Pipe(duplex=False)
        worker = context.Process(
            target=_work, args=(send, Place(rank, world_size, rank, "environment"), variables, function, arguments)
        )
        worker.start()
        send.close()
        pipes.append(receive)
        workers.append(worker)
    listening.close()
    return workers, pipes


def _work(send: Any, place: Place, variables: dict[str, str], function: Callable[..., Any], arguments: tuple) -> None:
    try:
        torch.set_num_threads(1)
        os.environ.update(variables)
        connect(place, torch.device("cpu"))
        send.send(("result", function(place, *arguments)))
    except BaseException:  # the parent raises it; a fork must never return into pytest
        send.send(("error", traceback.format_exc()))
    send.close()
    leave(0)
