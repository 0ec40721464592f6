"""The options of how a download behaves towards the servers of others."""

from __future__ import annotations

import argparse

from data_prep.downloading.courtesy import DISALLOW, Courtesy
from data_prep.downloading.opt_out import TDM_RESERVATION
from data_prep.options.shared import name_list, positive_number


class Names(tuple[str, ...]):
    """A tuple of words that ``--help`` shows as a user would type it."""

    def __str__(self) -> str:
        return ",".join(self)


def add_courtesy(parser: argparse.ArgumentParser) -> None:
    """The options that make a ``Courtesy``."""
    group = parser.add_argument_group("towards the servers (docs/downloading.md)")
    group.add_argument(
        "--user-agent",
        type=header_text,
        default=Courtesy.user_agent,
        help="who you are, as NAME/VERSION (+URL or mail address)",
    )
    group.add_argument(
        "--disallow",
        type=lambda text: Names(name_list(text)),
        default=Names(DISALLOW),
        help=f"directives of X-Robots-Tag that are obeyed, as A,B,...; {TDM_RESERVATION} is that header; '' for none",
    )
    group.add_argument(
        "--per-host", type=positive_number, default=Courtesy.per_host, help="connections to a host in each process"
    )
    group.add_argument(
        "--host-interval", type=seconds, default=Courtesy.host_interval, help="seconds at least between two of them"
    )
    group.add_argument(
        "--max-wait", type=seconds, default=Courtesy.max_wait, help="seconds at most that a server may ask to wait"
    )


def header_text(text: str) -> str:
    """A value that an HTTP header can hold: printable ASCII, of one line."""
    if not text.strip() or not text.isascii() or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r}, expected one line of plain letters, like lab-crawler/1.0 (+URL)")
    return text.strip()


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}, expected seconds, a number from 0")
    return value
