"""Numbers, differences, shares and spans of time as pages show them."""

from __future__ import annotations

import math
from typing import Any

_SPOKEN = (
    ("cider_d", "CIDEr-D"),
    ("bleu_", "BLEU-"),
    ("bleu", "BLEU"),
    ("rouge_l", "ROUGE-L"),
    ("meteor", "METEOR"),
    ("spice", "SPICE"),
)


def number(value: Any) -> str:
    """A number for people: four significant digits, thousands apart."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if not math.isfinite(value):
        return "not finite"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", "\u202f")
    return f"{value:.4g}"


def signed(value: float) -> str:
    """A difference for people, with its sign."""
    return f"{value:+.3f}".replace("-", "\u2212") if math.isfinite(value) else "not finite"


def percent(share: Any) -> str:
    """A share from 0 to 1 for people."""
    return f"{100 * share:.1f} %" if is_finite(share) else number(share)


def duration(seconds: float) -> str:
    """A time span for people."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def spoken(name: str) -> str:
    """The name of a number for people: ``cider_d_wrong_image`` is CIDEr-D wrong image."""
    for found, said in _SPOKEN:
        name = name.replace(found, said)
    return name.replace("_", " ").replace("/", " ")


def is_finite(value: Any) -> bool:
    """Whether it is a number that can be drawn: neither a text, nor NaN or infinite, nor a yes or no."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
