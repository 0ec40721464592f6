"""Command lines of the programs beside training: a parser that shows a program's docstring, and its numbers."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass


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


@dataclass(frozen=True)
class whole_number:  # noqa: N801  it stands where types of options stand
    """The type of an option that takes a whole number of at least ``least``, 0 or more."""

    least: int = 1

    def __call__(self, text: str) -> int:
        if not text.isdecimal() or int(text) < self.least:
            raise argparse.ArgumentTypeError(f"found {text!r}, expected {self}")
        return int(text)

    def __repr__(self) -> str:
        return f"a whole number of at least {self.least}"


@dataclass(frozen=True)
class number:  # noqa: N801
    """The type of an option that takes a finite number above 0, also 0 if it may be ``zero``, of at most ``most``."""

    unit: str = ""
    zero: bool = False
    most: float = math.inf

    def __call__(self, text: str) -> float:
        try:
            found = float(text)
        except ValueError:
            found = math.nan
        if not (0 < found < math.inf or self.zero and found == 0) or found > self.most:
            raise argparse.ArgumentTypeError(f"found {text!r}, expected {self}")
        return found

    def __repr__(self) -> str:
        kind = f"a number of {self.unit}" if self.unit else "a number"
        bounds = "of at least 0" if self.zero else "above 0"
        return f"{kind} {bounds}" + (f", at most {self.most:g}" if self.most < math.inf else "")
