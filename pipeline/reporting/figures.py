"""Draws line figures as inline SVG that follows the colours and fonts of the page around it."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass

from markupsafe import Markup, escape

NUM_COLOURS = 6
_INK, _FAINT = "#010203", "#040506"  # stand-ins, replaced by variables of the page so that figures follow its theme
_NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}  # RDF, which HTML does not have
_SERIES = [f"#0a0b{number:02x}" for number in range(NUM_COLOURS)]


@dataclass
class Series:
    """One line of a figure."""

    label: str
    steps: list[int]
    values: list[float]
    colour: int
    dashed: bool = False


def draw(title: str, series: list[Series], smooth: bool = False, from_zero: bool = False, axis: str = "step") -> Markup:
    """The lines as inline SVG whose colours and fonts are those of the page; dashed ones are not in the legend.

    ``title`` is the figure's name for screen readers and, as each has its own, makes its ids unique in the page.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import MaxNLocator

    style = {"svg.fonttype": "none", "svg.hashsalt": "openflm", "font.size": 9, "axes.edgecolor": _FAINT,
             "text.color": _INK, "xtick.color": _FAINT, "ytick.color": _FAINT, "xtick.labelcolor": _INK,
             "ytick.labelcolor": _INK, "axes.labelcolor": _INK, "grid.color": _FAINT}  # fmt: skip
    with matplotlib.rc_context(style):
        canvas = Canvas(figsize=(5.4, 2.7), layout="constrained")
        axes = canvas.subplots()
        for one in series:
            colour = _SERIES[one.colour]
            line = {
                "color": colour,
                "linewidth": 1.8,
                "label": None if one.dashed else _plain(one.label),
                "solid_capstyle": "round",
            }
            line |= {"linestyle": (0, (4, 2.5)), "alpha": 0.8} if one.dashed else {}
            many = len(one.values) > 20
            if smooth and many:
                axes.plot(one.steps, one.values, color=colour, linewidth=0.8, alpha=0.35)
            line |= {} if many else {"marker": "o", "markersize": 3}
            axes.plot(
                one.steps,
                smoothed(one.values, 1 - 1 / max(2.0, len(one.values) / 40)) if smooth and many else one.values,
                **line,
            )
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.5, alpha=0.5)
        axes.tick_params(length=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.margins(x=0.01)
        if from_zero and min(min(one.values) for one in series) >= 0:
            axes.set_ylim(0, 1.1 * max(max(one.values) for one in series))
        axes.set_xlabel(axis)
        if sum(not one.dashed for one in series) > 1:
            canvas.legend(loc="outside upper left", ncols=6, frameon=False, handlelength=1.6, columnspacing=1.4)
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
    prefix = re.sub("[^a-z0-9]+", "-", title.lower())
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    for stand_in, variable in [(_INK, "ink"), (_FAINT, "faint"), *((c, f"s{i}") for i, c in enumerate(_SERIES))]:
        svg = svg.replace(stand_in, f"var(--{variable})")
    return Markup(svg)


def _plain(label: str) -> str:
    """A label that Matplotlib takes as it is: no formula, and in the legend though it begins with "_"."""
    return re.sub("^_", " _", label.replace("$", r"\$"))


def smoothed(values: list[float], weight: float) -> list[float]:
    """Exponential mean with bias correction."""
    mean, total, result = 0.0, 0.0, []
    for value in values:
        mean = weight * mean + (1 - weight) * value
        total = weight * total + (1 - weight)
        result.append(mean / total)
    return result
