"""Shows a job, running or ended, from its run folder alone: step, speed, time left, slow ranks, incidents.

    python -m pipeline.status RUN [--json] [--watch SECONDS]

Whether it still runs is known by a heartbeat that moves, which may take half a minute to see.
Exit codes: 0 shown, 2 no run there.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_prep.program import run_program
from pipeline.cluster.status import StatusReader
from pipeline.config.options import ConfigError, fail
from pipeline.config.program_options import number, program_parser


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        reader = StatusReader(arguments.run)
    except ConfigError as error:
        return fail(error)
    while True:
        status = reader.read()
        if arguments.json:
            print(json.dumps(status), flush=True)
        else:
            print("\n".join(f"{name:<16}{text}" for name, text in lines(status)), flush=True)
        if arguments.watch is None:
            return 0
        time.sleep(arguments.watch)
        if not arguments.json:
            print()


def lines(status: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The status for people, a name and a text a line."""
    yield "run", status["run"]
    yield "state", status["state"] + (f": {status['why']}" if status["why"] else "")
    total = f" of {status['steps']}" if status["steps"] else ""
    doing = f", {status['doing']['doing']}" if status["doing"] else ""
    yield "step", f"{status['step']}{total}{doing}"
    if status["step_seconds"] is not None:
        wait = f", {status['data_wait_share']:.0%} of it waiting for data" if status["data_wait_share"] else ""
        rate, seconds = status["samples_per_second"] or 0.0, status["step_seconds"]
        yield "speed", f"{rate:.4g} samples/s, {seconds:.3g} s a step{wait}; loss {status['loss']:.4g}"
    if status["eta_seconds"] is not None:
        yield "time left", f"{_duration(status['eta_seconds'])}, as long as it runs"
    saved, seconds = status["checkpoint"]["step"], status["checkpoint"]["seconds"]
    took = f", the last save took {seconds:.1f} s" if seconds is not None else ""
    yield "checkpoint", "none" if saved is None else f"step {saved}{took}"
    if status["world_size"]:
        yield "ranks", f"{status['world_size']} on {', '.join(_some(status['hosts']))}"
    for one in status["slow_ranks"]:
        took = f"{one['what']} {one['seconds']:.3g} s a step, the middle rank {one['others_seconds']:.3g} s"
        yield "slow rank", f"rank {one['rank']} on {one['host']} {took}"
    for one in status["behind"]:
        silent = "says nothing" if one["silent"] else f"{one['doing']} for {one['seconds']:.0f} s"
        yield "behind", f"rank {one['rank']} on {one['host']} {silent} ({one['where']})"
    incidents = {name: count for name, count in status["incidents"].items() if name not in ("last", "last_step")}
    if incidents:
        last = f"; the last at step {status['incidents']['last_step']}: {status['incidents']['last']}"
        yield "incidents", ", ".join(f"{count} {name}" for name, count in incidents.items()) + last
    attempts = status["attempts"]
    if attempts["begun"]:
        ended = f"{attempts['failed']} failed, {attempts['stopped']} told to stop"
        without = f"; kept out: {', '.join(attempts['excluded'])}" if attempts["excluded"] else ""
        yield "attempts", f"{attempts['begun']} begun, {ended}{without}"


def _some(names: list[str]) -> list[str]:
    return names if len(names) <= 4 else [*names[:3], f"{len(names) - 3} more"]


def _duration(seconds: float) -> str:
    hours, minutes = divmod(math.ceil(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def _parser() -> argparse.ArgumentParser:
    parser = program_parser("pipeline.status", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the --output folder of a training")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument(
        "--watch", type=number("seconds"), metavar="SECONDS", help="show it again so often, until Ctrl-C"
    )
    return parser


if __name__ == "__main__":
    run_program(main)
