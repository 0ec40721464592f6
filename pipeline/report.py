"""Writes RUN/report.html, one self-contained page with the curves, costs, evaluations and captions of a run.

python -m pipeline.report --run RUN
python -m pipeline.report --runs RUN RUN ... [--output FILE]     compares runs on one page
python -m pipeline.report --scores RUN ...                       prints the scores of their evaluations
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from data_prep.program import run_program
from pipeline.comparing.page import COMPARISON_NAME, write_comparison
from pipeline.reporting.page import write_report
from pipeline.reporting.reading import ReportError
from pipeline.reporting.scores import table_of_scores


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.report", description="Write RUN/report.html, or a page that compares runs."
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=Path, metavar="RUN", help="the --output folder of a training run")
    which.add_argument("--runs", type=Path, nargs="+", metavar="RUN", help="folders of runs to compare on one page")
    which.add_argument("--scores", type=Path, nargs="+", metavar="RUN", help="folders of runs whose scores to print")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=f"page of the comparison (default: {COMPARISON_NAME})"
    )
    arguments = parser.parse_args(argv)
    try:
        if arguments.runs is not None:
            print(write_comparison(arguments.runs, arguments.output or Path(COMPARISON_NAME)))
        elif arguments.output is not None:
            raise ReportError("--output is for --runs; of one run the page is RUN/report.html")
        elif arguments.scores is not None:
            print(table_of_scores(arguments.scores))
        else:
            print(write_report(arguments.run))
    except BrokenPipeError:
        raise
    except (ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_program(main)
