"""Command lines of the programs beside training: a parser that shows a program's docstring, and its numbers."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def program_parser(module: str, doc: str) -> argparse.ArgumentParser:
    """A parser for ``python -m MODULE``: its help begins with the first paragraph of ``doc`` and ends with the rest."""
    description, *rest = doc.split("\n\n")
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        epilog="\n\n".join(rest),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def whole_number(least: int = 1) -> Callable[[str], int]:
    """The type of an option that takes a whole number of at least ``least``, 0 or more."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number of at least {least}")
        return int(text)

    return parse


def number(unit: str = "", zero: bool = False, most: float = math.inf) -> Callable[[str], float]:
    """The type of an option that takes a finite number above 0, also 0 if it may be ``zero``, of at most ``most``."""

    def parse(text: str) -> float:
        try:
            found = float(text)
        except ValueError:
            found = math.nan
        if not (0 < found < math.inf or zero and found == 0) or found > most:
            kind = f"a number of {unit}" if unit else "a number"
            bounds = ("of at least 0" if zero else "above 0") + (f", at most {most:g}" if most < math.inf else "")
            raise argparse.ArgumentTypeError(f"found {text!r}, expected {kind} {bounds}")
        return found

    return parse
