"""The options of a dry run, which the training program takes besides its settings."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from pipeline.config.options import ConfigError
from pipeline.config.program_options import number, whole_number

DRY_RUN_OPTIONS = ("dry-run", "dry-run-steps", "dry-run-samples-per-second", "json")


@dataclass(frozen=True)
class DryRun:
    """What a dry run is to say: ``steps`` that it measures (0: none), or the throughput that hours are told from."""

    steps: int = 0
    samples_per_second: float | None = None
    as_json: bool = False


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}")


def add_dry_run_options(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the options of DRY_RUN_OPTIONS, in a group of their own."""
    group = parser.add_argument_group("Before training")
    about = "say what this run would be and cost, train nothing, write nothing; ends with 2 where it would be refused"
    group.add_argument("--dry-run", action="store_true", help=about)
    about = "measure so many steps, an evaluation and a save on the ranks that are here; their files are removed again"
    group.add_argument("--dry-run-steps", type=whole_number(3), metavar="N", help=about)
    about = "count the hours at this throughput of all ranks, measured elsewhere"
    group.add_argument("--dry-run-samples-per-second", type=number(), metavar="X", help=about)
    group.add_argument("--json", action="store_true", help="print what a dry run says as JSON")


def take_dry_run(argv: Sequence[str]) -> tuple[DryRun | None, list[str]]:
    """The dry run that a command line asks for, if it does, and the words that are left.

    Raises:
        ConfigError: numbers that are none, or options that contradict each other.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    add_dry_run_options(parser)
    if not any(word.split("=", 1)[0].removeprefix("--") in DRY_RUN_OPTIONS for word in argv):
        return None, list(argv)
    options, rest = parser.parse_known_args(list(argv))
    steps, rate = options.dry_run_steps, options.dry_run_samples_per_second
    if steps and rate:
        raise ConfigError(
            "command line: --dry-run-steps measures what --dry-run-samples-per-second says; give one of them"
        )
    if not (options.dry_run or steps or rate):
        raise ConfigError("command line: --json is the form of a dry run; add --dry-run, or leave it out")
    return DryRun(steps or 0, rate, options.json), rest
