"""Whether a server's headers forbid the use of an image (X-Robots-Tag, TDM-Reservation)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from email.message import Message

TDM_RESERVATION = "tdm-reservation"  # W3C's TDM Reservation Protocol: a header of that name with the value 1
_VALUED = {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}  # directives with a colon
_ROBOT = re.compile(r"\*|[\w.-]+")
_MEANS = {"none": {"none", "noindex", "nofollow"}}


def disallowed_by(headers: Message, disallow: Iterable[str], user_agent: str) -> str | None:
    """The header that forbids the use by one of the directives ``disallow``, or None.

    X-Robots-Tag is ``[robot:] directive, directive, ...``, any number of times; directives for another robot than the
    product that ``user_agent`` begins with do not count. Source: Google's robots meta tag specification.
    """
    unwanted = {directive.strip().lower() for directive in disallow}
    if TDM_RESERVATION in unwanted and headers.get("TDM-Reservation", "").strip() == "1":
        return "TDM-Reservation"
    product = user_agent.partition("/")[0].split(" ")[0].lower()
    for value in headers.get_all("X-Robots-Tag", []):
        if unwanted & _directives(value, product):
            return "X-Robots-Tag"
    return None


def _directives(value: str, product: str) -> set[str]:
    found: set[str] = set()
    for_us = True
    for item in value.lower().split(","):
        name, colon, rest = (part.strip() for part in item.partition(":"))
        if colon and name not in _VALUED and _ROBOT.fullmatch(name):
            for_us, name = name in (product, "*"), rest.partition(":")[0].strip()
        if for_us:
            found |= _MEANS.get(name, {name})
    return found
