"""Draws line figures as inline SVG that follows the colours and fonts of the page around it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

NUM_COLOURS = 6
WIDTH, HEIGHT = 400, 230
_LEFT, _TOP, _BOTTOM, _BARE_RIGHT = 46, 18, 36, 12
_LETTER, _LINE = 7.2, 13  # width and height of a letter of the names, about
_MOST_LETTERS = 16
_MOST_POINTS = 400  # of a line; more would not be seen
FEW = 20  # points: up to so many each has its marker, and nothing is smoothed


@dataclass
class Series:
    """One line of a figure: ``values`` at the places ``at`` of the axis. Dashed lines and those without a label have
    none at their end."""

    label: str
    at: list[float]
    values: list[float]
    colour: int
    dashed: bool = False


@dataclass(frozen=True)
class Mark:
    """Something that happened at a place of the axis: a short name above the figure, and all of it for who asks.

    One of a ``colour`` belongs to the lines of that colour and is a small flag on the axis.
    """

    at: float
    name: str
    details: str = ""
    colour: int | None = None


def draw(
    title: str,
    series: Sequence[Series],
    smooth: bool = False,
    from_zero: bool = False,
    axis: str = "step",
    marks: Sequence[Mark] = (),
) -> Markup:
    """The lines as inline SVG without ids, each named at its end where there are several.

    ``title`` and where each line begins and ends are what screen readers say of it. ``smooth`` draws lines of many
    points twice: as they are, and thick by ``smoothed``. Values must be finite; places rise.
    """
    named = [one for one in series if one.label and not one.dashed]
    named = named if len(named) > 1 else []
    longest = max((min(len(one.label), _MOST_LETTERS) for one in named), default=0)
    right = 14 + longest * _LETTER if named else _BARE_RIGHT
    across = _Axis.of([at for one in series for at in one.at], _LEFT, WIDTH - right, False)
    values = [value for one in series for value in one.values]
    up = _Axis.of(values, HEIGHT - _BOTTOM, _TOP, from_zero and min(values) >= 0, room=0.05)
    parts = [*_grid(across, up, WIDTH - right, axis), *_marks(marks, across)]
    for one in series:
        parts += _line(one, across, up, smooth)
    parts += _labels(named, across, up, WIDTH - right + 7, smooth)
    said = ", ".join(f"{one.label} {one.values[0]:.4g} to {one.values[-1]:.4g}" for one in named or series[:1])
    label = escape(f"{title} by {axis}: {said}")
    return Markup(f'<svg role="img" aria-label="{label}" viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(parts)}</svg>')


def smoothing(num_points: int) -> float:
    """Over how many points ``draw`` smooths a line of as many: a fortieth of them, at least 2."""
    return max(2.0, num_points / 40)


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """Exponential mean with bias correction."""
    mean, total, result = 0.0, 0.0, []
    for value in values:
        mean = weight * mean + (1 - weight) * value
        total = weight * total + (1 - weight)
        result.append(mean / total)
    return result


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from ``low`` to ``high``: at most ``most`` of 1, 2 or 5 times a power of ten apart."""
    span = high - low
    if not span > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(factor * power for factor in (1, 2, 5, 10, 20) if span / (factor * power) <= most - 1 + 1e-9)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


@dataclass(frozen=True)
class _Axis:
    """From values to places on the paper."""

    low: float
    high: float
    begin: float
    end: float

    @classmethod
    def of(cls, values: Sequence[float], begin: float, end: float, from_zero: bool, room: float = 0.0) -> _Axis:
        low, high = (0.0 if from_zero else min(values)), max(values)
        if low == high:
            half = abs(low) / 2 or 0.5
            low, high = (low if from_zero else low - half), high + half
        more = room * (high - low)
        return cls(low if from_zero else low - more, high + more, begin, end)

    def __call__(self, value: float) -> float:
        return self.begin + (value - self.low) / (self.high - self.low) * (self.end - self.begin)


def _grid(across: _Axis, up: _Axis, right: float, axis: str) -> list[str]:
    parts = []
    for value in ticks(up.low, up.high, 6):
        parts.append(f'<path class="grid" d="M{_LEFT} {up(value):.1f}H{right:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 6}" y="{up(value) + 4:.1f}" text-anchor="end">{_short(value)}</text>'
        )
    shown = ticks(across.low, across.high, 6)
    if axis == "step":
        shown = [value for value in shown if value == int(value)]
    for value in shown:
        parts.append(
            f'<text class="tick" x="{across(value):.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">'
            f"{_short(value)}</text>"
        )
    parts.append(
        f'<text class="tick" x="{(_LEFT + right) / 2:.1f}" y="{HEIGHT - 4}" text-anchor="middle">{escape(axis)}</text>'
    )
    return parts


def _short(value: float) -> str:
    """A number of an axis in few letters."""
    for least, size, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / size:g}{letter}"
    return f"{round(value, 12):g}".replace("-", "\u2212")


def _marks(marks: Sequence[Mark], across: _Axis) -> list[str]:
    """A line up the figure for each, named where there is room."""
    parts, free = [], 0.0
    for mark in sorted(marks, key=lambda one: one.at):
        if not across.low <= mark.at <= across.high:
            continue
        x = across(mark.at)
        said = escape(": ".join(filter(None, (mark.name, mark.details))))
        if mark.colour is not None:
            flag = f"M{x:.1f} {HEIGHT - _BOTTOM}v-9h7l-2.5 2.5l2.5 2.5h-6"
            parts.append(f'<path class="flag c{mark.colour}" d="{flag}"><title>{said}</title></path>')
            continue
        parts.append(f'<g class="mark"><title>{said}</title><path d="M{x:.1f} {_TOP - 4}V{HEIGHT - _BOTTOM}"/>')
        width = len(mark.name) * 0.8 * _LETTER
        left = min(max(x - width / 2, 0), WIDTH - width)
        if left >= free:
            parts.append(f'<text x="{left:.1f}" y="{_TOP - 7}">{escape(mark.name)}</text>')
            free = left + width + 6
        parts.append("</g>")
    return parts


def _line(one: Series, across: _Axis, up: _Axis, smooth: bool) -> list[str]:
    place = [(across(at), up(value)) for at, value in zip(one.at, one.values, strict=True)]
    many = len(place) > FEW
    kind = f"line c{one.colour}" + (" dashed" if one.dashed else "")
    if not many:
        dots = "" if one.dashed else "".join(_dot(one.colour, x, y) for x, y in place)
        return [_path(kind, place), dots]
    if not smooth:
        return [_path(kind, _thinned(place))]
    mean = smoothed(one.values, 1 - 1 / smoothing(len(place)))
    thick = [(x, up(value)) for (x, _), value in zip(place, mean, strict=True)]
    return [_path(f"{kind} thin", _thinned(place)), _path(kind, _thinned(thick))]


def _path(kind: str, place: Sequence[tuple[float, float]]) -> str:
    return f'<path class="{kind}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in place)}"/>'


def _thinned(place: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The lowest and the highest of each stretch, so that no peak is lost; the ends stay."""
    size = math.ceil(len(place) / (_MOST_POINTS / 2))
    if size <= 2:
        return list(place)
    kept = [place[0]]
    for begin in range(1, len(place) - 1, size):
        part = place[begin : min(begin + size, len(place) - 1)]
        kept += sorted({min(part, key=lambda one: one[1]), max(part, key=lambda one: one[1])})
    return [*kept, place[-1]]


def _dot(colour: int, x: float, y: float) -> str:
    """A marker of another shape for each colour: circle, square, two triangles, diamond, cross."""
    shapes = (
        "m-2.6 0a2.6 2.6 0 1 0 5.2 0a2.6 2.6 0 1 0 -5.2 0z",
        "m-2.4 -2.4h4.8v4.8h-4.8z",
        "m0 -3.2l3 5.4h-6z",
        "m0 3.2l3 -5.4h-6z",
        "m0 -3.4l3.4 3.4l-3.4 3.4l-3.4 -3.4z",
        "m-1 -3h2v2h2v2h-2v2h-2v-2h-2v-2h2z",
    )
    return f'<path class="dot c{colour}" d="M{x:.1f} {y:.1f}{shapes[colour % NUM_COLOURS]}"/>'


def _labels(named: Sequence[Series], across: _Axis, up: _Axis, x: float, smooth: bool) -> list[str]:
    """The name of each line at its end, moved apart where they would stand on each other."""
    wanted = []
    for one in named:
        many = smooth and len(one.values) > FEW
        last = smoothed(one.values, 1 - 1 / smoothing(len(one.values)))[-1] if many else one.values[-1]
        wanted.append((up(last), one))
    wanted.sort(key=lambda pair: pair[0])
    places: list[float] = []
    for y, _ in wanted:
        places.append(max(y, places[-1] + _LINE if places else _TOP))
    below = HEIGHT - _BOTTOM + 4.0
    for number in reversed(range(len(places))):
        places[number] = min(places[number], below)
        below = places[number] - _LINE
    parts = []
    for y, (end, one) in zip(places, wanted, strict=True):
        begin = across(one.at[-1])
        if x - begin > 3 * _LETTER:  # a run that ended early: from its end to its name
            parts.append(f'<path class="line lead c{one.colour}" d="M{begin + 4:.1f} {end:.1f}L{x - 3:.1f} {y:.1f}"/>')
        parts.append(
            f'<text class="name c{one.colour}" x="{x:.1f}" y="{y + 4:.1f}">'
            f"<title>{escape(one.label)}</title>{escape(_cut(one.label))}</text>"
        )
    return parts


def _cut(label: str) -> str:
    return label if len(label) <= _MOST_LETTERS else f"{label[: _MOST_LETTERS - 1]}…"
