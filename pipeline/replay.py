"""Repeats a bad step in one process: python -m pipeline.replay RUN/incidents/step_N

Rebuilds the micro-batches of all ranks from the run's data, loads the weights from before the step, runs every forward
and backward pass with the dropout it had, and compares with the record.

Exit codes: 0 the record was reproduced, 1 it was not, 2 something needed is missing or damaged.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from data_prep.program import run_program
from pipeline.config.options import fail
from pipeline.finetuning.table import task_of
from pipeline.training.replay import load_replay, print_comparison, run_sample, run_step


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    try:
        replay = load_replay(options.incident, torch.device(options.device), task_of, options.data)
        if options.sample is not None:
            return run_sample(replay, options.sample)
        run_step(replay)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        return fail(ValueError(str(error)))
    except RuntimeError as error:  # an unknown device, a model that does not fit into memory
        return fail(ValueError(f"--device {options.device}: {str(error).splitlines()[0]}"))
    return print_comparison(replay)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.replay",
        description="Repeat a bad step of a training run in one process and compare it with its record.",
        epilog="Start it where the run was started if its data paths are relative. Exit codes: 0 reproduced, "
        "1 not reproduced, 2 something needed is missing or damaged.",
    )
    parser.add_argument("incident", type=Path, metavar="INCIDENT", help="RUN/incidents/step_N")
    parser.add_argument("--device", default="cpu", help="where to compute: cpu, cuda, cuda:1 (default: cpu)")
    parser.add_argument("--sample", metavar="KEY", help="run this sample of the step alone")
    parser.add_argument("--data", nargs="+", metavar="DIR", help="where the run's data lies now, in the run's order")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_program(main)
