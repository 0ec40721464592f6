"""Draws bars as inline SVG in the colours and font of the page around them."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape

WIDTH, HEIGHT, _LEFT, _BOTTOM, _TOP = 460, 190, 8, 24, 18
_MAX_LABELS = 12


def histogram(title: str, labels: Sequence[str], counts: Sequence[int]) -> Markup:
    """A bar for each of ``labels``, its height the count; ``title`` is its name for screen readers."""
    most, step = max(counts, default=0) or 1, (WIDTH - 2 * _LEFT) / max(1, len(counts))
    room = HEIGHT - _TOP - _BOTTOM
    parts = []
    for number, (label, count) in enumerate(zip(labels, counts)):
        height = room * count / most
        left, top = _LEFT + number * step, HEIGHT - _BOTTOM - height
        said = f"{label}: {count:,}"
        parts.append(
            f'<rect x="{left + 0.5:.1f}" y="{top:.1f}" width="{max(1, step - 1):.1f}" height="{height:.1f}" rx="1.5">'
            f"<title>{escape(said)}</title></rect>"
        )
        if number % (-(-len(labels) // _MAX_LABELS)) == 0:
            parts.append(f'<text x="{left + step / 2:.1f}" y="{HEIGHT - 8}" class="tick">{escape(label)}</text>')
    parts.append(f'<text x="{_LEFT}" y="12" class="most">most in a bar: {most:,}</text>')
    return _svg(f"{title}: {_in_words(labels, counts)}", HEIGHT, parts)


def stacked_bar(title: str, names: Sequence[str], counts: Sequence[int]) -> Markup:
    """One bar, divided in proportion to ``counts``; colours s0, s1, ... of the page in the order of ``names``."""
    total, left, parts = sum(counts) or 1, 0.0, []
    for number, (name, count) in enumerate(zip(names, counts)):
        width = WIDTH * count / total
        said = f"{name}: {count:,} ({count / total:.1%})"
        parts.append(
            f'<rect x="{left:.2f}" y="0" width="{width:.2f}" height="26" class="s{number}">'
            f"<title>{escape(said)}</title></rect>"
        )
        left += width
    return _svg(f"{title}: {_in_words(names, counts)}", 26, parts, 'preserveAspectRatio="none"')


def _in_words(names: Sequence[str], counts: Sequence[int]) -> str:
    """What is drawn, for those who do not see it: the most frequent first."""
    ordered = sorted(zip(counts, names), key=lambda one: -one[0])
    return ", ".join(f"{name} {count:,}" for count, name in ordered[:8] if count) or "nothing"


def _svg(label: str, height: int, parts: Sequence[str], attributes: str = "") -> Markup:
    opening = f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {WIDTH} {height}" {attributes}>'
    return Markup(opening + "".join(parts) + "</svg>")
