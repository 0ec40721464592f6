"""The verbs that look at what is prepared."""

from __future__ import annotations

import argparse
import json

from data_prep.checks import info, overlap
from data_prep.checks.verify import verify_split
from data_prep.filters import Limits
from data_prep.options.shared import (
    DATA,
    decoding_limits,
    local_path,
    positive_number,
)
from data_prep.parallel import default_workers


def run_verify(args: argparse.Namespace) -> int:
    num_problems = 0
    for split_dir in [split for path in args.data for split in info.all_splits(path)]:
        found = verify_split(split_dir, decoding_limits(args), args.workers)
        state = "ok" if not found.problems else f"{len(found.problems)} problem(s)"
        print(f"{split_dir}: {found.rows} rows, {found.samples} samples, {found.images} images decoded: {state}")
        for problem in found.problems[: args.max_problems]:
            print(f"  {problem}")
        if len(found.problems) > args.max_problems:
            print(f"  ... and {len(found.problems) - args.max_problems} more (--max-problems)")
        num_problems += len(found.problems)
    return 1 if num_problems else 0


def add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=local_path, nargs="*", default=DATA, help="split, corpus or root folders")
    parser.add_argument("--max-problems", type=positive_number, default=20, help="lines shown for each split")
    parser.add_argument("--workers", type=positive_number, default=default_workers())
    parser.add_argument("--max-pixels", type=positive_number, default=Limits.max_pixels)


def run_info(args: argparse.Namespace) -> int:
    descriptions = [info.describe_split(split) for path in args.data for split in info.all_splits(path)]
    print(json.dumps(descriptions, indent=1) if args.json else info.format_table(descriptions))
    return 0


def add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=local_path, nargs="*", default=DATA, help="split, corpus or root folders")
    parser.add_argument("--json", action="store_true", help="everything, for programs")


def run_overlap(args: argparse.Namespace) -> int:
    found = overlap.compare_splits([split for path in args.data for split in info.all_splits(path)])
    print("\n".join(found.lines))
    return 1 if found.shared else 0


def add_overlap(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=local_path, nargs="*", default=DATA, help="split, corpus or root folders")
