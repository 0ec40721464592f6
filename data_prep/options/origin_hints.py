"""Tells in the help of a verb, and where a file is missing, what its user must download and whose terms hold."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from data_prep.options.shared import Verb
from data_prep.record import MissingInput
from data_prep.sources.origins import ORIGINS, Origin


def with_origins(verbs: dict[str, Verb]) -> dict[str, Verb]:
    """The verbs, those of published corpora with the origin of their files in help texts and error messages."""
    return {name: _with_origin(verb, ORIGINS[name]) if name in ORIGINS else verb for name, verb in verbs.items()}


def _with_origin(verb: Verb, origin: Origin) -> Verb:
    summary, add_options, run = verb
    return summary, _telling(add_options, origin), _explaining(run, origin)


def _telling(add_options: Callable[[argparse.ArgumentParser], None], origin: Origin) -> Callable:
    def add(parser: argparse.ArgumentParser) -> None:
        add_options(parser)
        parser.epilog = f"The files are published, and yours to fetch: {origin.sentence()}.".replace("%", "%%")

    return add


def _explaining(run: Callable[[argparse.Namespace], int], origin: Origin) -> Callable[[argparse.Namespace], int]:
    def explained(args: argparse.Namespace) -> int:
        try:
            return run(args)
        except MissingInput as error:
            raise MissingInput(f"{error}; {origin.sentence()}") from error

    return explained
