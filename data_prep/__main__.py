"""The command line: ``python -m data_prep VERB --help``."""

from __future__ import annotations

import argparse
import difflib
import signal
import sys
from typing import NoReturn

from data_prep.manifest import ManifestError
from data_prep.program import run_program
from data_prep.record import PrepError
from data_prep.stores.failures import StoreError
from data_prep.verbs.table import VERBS
from data_prep.video.decoding import DecoderMissing


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (`{self.prog} --help` lists the options)", file=sys.stderr)
        raise SystemExit(2)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults other than None, False and an empty list."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return (
            action.help if action.default in (None, []) or action.default is False else super()._get_help_string(action)
        )


def main(arguments: list[str] | None = None) -> int:
    """Run a verb; returns the exit code: 0 done, 1 verify found problems, 2 user error, 3 too low a yield."""
    args, unknown = build_parser().parse_known_args(arguments)
    if unknown:
        args.parser.error(_unknown_option(unknown[0], args.parser))
    # A batch system's SIGTERM must clean up like Ctrl-C does.
    previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        return VERBS[args.verb][2](args)
    except (PrepError, ManifestError, DecoderMissing, StoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    except BrokenPipeError:  # of stdout, mostly: for run_program
        raise
    except OSError as error:
        print(f"error: {error.filename or args.verb}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: no half-written split is left; run the same command again", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = _Parser(prog="python -m data_prep", description="Turn image-text data into verified shards.")
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)
    for verb, (summary, add_options, _) in VERBS.items():
        verb_parser = subparsers.add_parser(
            verb,
            help=summary,
            description=f"{summary[:1].upper()}{summary[1:]}.",
            allow_abbrev=False,
            formatter_class=_Formatter,
        )
        add_options(verb_parser)
        verb_parser.set_defaults(parser=verb_parser)
    return parser


def _unknown_option(option: str, parser: argparse.ArgumentParser) -> str:
    known = [name for action in parser._actions for name in action.option_strings]
    close = difflib.get_close_matches(option.split("=")[0], known, n=1)
    return f"unknown option {option}" + (f"; did you mean {close[0]}?" if close else "")


if __name__ == "__main__":
    run_program(main)
