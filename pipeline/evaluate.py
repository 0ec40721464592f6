"""Held-out loss and accuracy of every term, with the own image and with another sample's.

    python -m pipeline.evaluate --run RUN [--data DIR...] [--split dev] [--samples N]

Exit codes: 0 done, 2 a wrong command line or nothing to evaluate, 75 told to stop.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from data_prep.program import run_program
from pipeline.checkpoint.restore import resolve
from pipeline.config.command_line import load_config
from pipeline.config.options import fail
from pipeline.distributed.preempt import EXIT_PREEMPTED, StopRequest
from pipeline.tasks.evaluation import evaluate_run
from pipeline.tasks.table import task_of


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="run folder, or one of its checkpoint folders")
    parser.add_argument("--data", nargs="+", metavar="DIR", help="data to evaluate on (default: the run's)")
    parser.add_argument("--split", help="split to evaluate on (default: the run's data.eval_split)")
    parser.add_argument("--samples", type=int, help="held-out samples, evenly spaced (default: all)")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if arguments.samples is not None and arguments.samples < 1:
            raise ValueError(f"--samples: found {arguments.samples}, expected at least 1")
        config = load_config(resolve(arguments.run).parent.parent)
        config.data.paths = arguments.data or config.data.paths
        config.data.eval_split = arguments.split or config.data.eval_split
        config.train.eval_samples = arguments.samples
        values = evaluate_run(arguments.run, config, task_of(config), device, StopRequest().listen())
    except ValueError as error:
        return fail(error)
    if values is None:
        return EXIT_PREEMPTED
    print(json.dumps({name: round(value, 6) for name, value in values.items()}, indent=1))
    return 0


if __name__ == "__main__":
    run_program(main)
