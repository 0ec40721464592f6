"""Writes RUN/report.html, one self-contained page with the curves, costs and captions of a run.

python -m pipeline.report --run RUN
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from data_prep.program import run_program
from pipeline.reporting.page import ReportError, write_report


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.report", description="Write RUN/report.html.")
    parser.add_argument("--run", type=Path, required=True, help="the --output folder of a training run")
    arguments = parser.parse_args(argv)
    try:
        print(write_report(arguments.run))
    except BrokenPipeError:
        raise
    except (ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_program(main)
