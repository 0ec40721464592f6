"""The verb that draws prepared data as a page."""

from __future__ import annotations

import argparse

from data_prep.checks.info import all_splits
from data_prep.options.shared import local_path, positive_number, whole_number
from data_prep.parallel import default_workers
from data_prep.record import PrepError
from data_prep.reporting.page import REPORT_NAME, write_report


def run_report(args: argparse.Namespace) -> int:
    output = args.output or args.data / REPORT_NAME
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise PrepError(f"--output {output}: expected a file in a folder that is there")
    write_report(all_splits(args.data), output, args.samples, args.seed, args.repeated, args.workers)
    print(f"{output}: written")
    return 0


def add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=local_path, help="split, corpus or root folder")
    parser.add_argument("--output", type=local_path, help="the page; default: report.html in the folder")
    parser.add_argument("--samples", type=whole_number, default=24, help="samples shown of each split")
    parser.add_argument("--seed", type=whole_number, default=0, help="which samples")
    parser.add_argument("--repeated", action="store_true", help="read all images, and show those that come most often")
    parser.add_argument("--workers", type=positive_number, default=default_workers(), help="processes")
