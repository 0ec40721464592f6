"""Decides whether a job that ended is started again, and notes it in RUN/attempts.jsonl; for job scripts.

    python -m pipeline.restart --run RUN --job ID --attempt N --code C --nodes "n1 n2"

stdout: a line `exclude NODE` for each node to keep out of the next attempt. stderr: what happens and why.
Exit codes: 0 start it again; any other is that of the job.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from data_prep.program import run_program
from pipeline.cluster.restarts import NAME, End, Limits, conclude
from pipeline.config.program_options import program_parser, whole_number
from pipeline.distributed.endings import EXIT_MEND


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    arguments = _parser().parse_args(argv)
    end = End(arguments.job, arguments.attempt, arguments.code, arguments.nodes.replace(",", " ").split())
    try:
        decision = conclude(arguments.run, end, Limits(arguments.max_restarts, arguments.same_failure))
    except OSError as error:
        file, reason = error.filename or arguments.run / NAME, error.strerror or error
        print(f"error: {file}: {reason}; not started again, as restarts can't be counted there", file=sys.stderr)
        return EXIT_MEND
    print(decision.line, file=sys.stderr)
    for node in decision.excluded:
        print(f"exclude {node}")
    return 0 if decision.requeue else decision.code


def _parser() -> argparse.ArgumentParser:
    parser = program_parser("pipeline.restart", __doc__)
    parser.add_argument("--run", type=Path, required=True, metavar="RUN", help="the --output folder of the training")
    parser.add_argument("--job", required=True, metavar="ID", help="the job, by the same name at every attempt")
    parser.add_argument(
        "--attempt", type=whole_number(0), required=True, metavar="N", help="how often it was started before"
    )
    parser.add_argument("--code", type=whole_number(), required=True, metavar="C", help="exit code of its step, not 0")
    parser.add_argument("--nodes", default="", metavar='"N1 N2"', help="the nodes that it had")
    budget = "restarts of the job at most, but those after it was told to stop and saved a newer step (default: 50)"
    parser.add_argument("--max-restarts", type=whole_number(0), default=50, metavar="N", help=budget)
    crash_loop = "equal failures in a row, without a newer checkpoint, that end it (default: 3)"
    parser.add_argument("--same-failure", type=whole_number(), default=3, metavar="N", help=crash_loop)
    return parser


if __name__ == "__main__":
    run_program(main)
