"""The two plots of a speedrun: what quality costs, and where each row ends."""

from __future__ import annotations

import io
import statistics
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from benchmarks.speedrun.curves import AXES, PROBES, Run, curve, finals, has_curve, mean_curve, measured_probes
from benchmarks.speedrun.rows import Row

STYLE = {"svg.fonttype": "none", "svg.hashsalt": "openflm", "font.size": 9, "axes.edgecolor": "#888888"}
PANELS = 3  # scores beside each other


def draw_curves(rows: Sequence[Row], by_row: Mapping[str, Sequence[Run]]) -> str:
    """Every probe of more than the last checkpoint against time, operations and samples: thin lines are seeds, thick
    ones their means, dashed ones have a share of the budget. SVG.
    """
    runs = [run for runs in by_row.values() for run in runs]
    probes = [probe for probe in measured_probes(runs) if has_curve(runs, probe)] or list(PROBES)[:1]
    with _figure(height=2.7 * len(probes) + 0.5) as (figure, buffer):
        grid = figure.subplots(len(probes), len(AXES), squeeze=False, sharey="row", sharex="col")
        for line, probe in zip(grid, probes, strict=True):
            line[0].set_ylabel(PROBES[probe])
            for axes, axis in zip(line, AXES, strict=True):
                for row, colour in zip(rows, _colours(rows), strict=True):
                    dashes = "-" if row.budget_share == 1 else "--"
                    _draw_row(axes, by_row.get(row.name, ()), probe, axis, row.name, colour, dashes)
                _bare(axes)
        for axes, label in zip(grid[-1], AXES.values(), strict=True):
            axes.set_xlabel(label)
        lines, names = grid[0][0].get_legend_handles_labels()
        if names:
            figure.legend(lines, names, loc="outside upper left", ncols=6, frameon=False)
    return buffer.getvalue()


def draw_scores(rows: Sequence[Row], by_row: Mapping[str, Sequence[Run]], captions: Mapping[str, float]) -> str:
    """Where each row ends, by every probe: small dots are seeds, bars their means. ``captions`` (name to CIDEr-D) are
    vertical lines where captions are scored by CIDEr-D. SVG.
    """
    runs = [run for runs in by_row.values() for run in runs]
    probes = measured_probes(runs) or list(PROBES)[:1]
    num_lines = -(-len(probes) // PANELS)
    with _figure(height=(0.24 * len(rows) + 0.9) * num_lines) as (figure, buffer):
        grid = figure.subplots(num_lines, PANELS, squeeze=False, sharey=True)
        for axes, probe in zip(grid.flat, probes):
            axes.set_title(textwrap.fill(PROBES[probe], 45), fontsize=9, loc="left")
            for place, (row, colour) in enumerate(zip(rows, _colours(rows), strict=True)):
                if values := finals(by_row.get(row.name, ()), probe):
                    axes.plot(
                        values,
                        [place] * len(values),
                        "o",
                        color=colour,
                        markersize=4,
                        alpha=0.55,
                        gid=f"{row.name} {probe}",
                    )
                    axes.plot([statistics.fmean(values)], [place], "|", color=colour, markersize=13, markeredgewidth=2)
            if probe.endswith("cider_d"):
                for name, value in captions.items():
                    axes.axvline(value, color="#888888", linewidth=0.8, linestyle=":")
                    axes.annotate(name, (value, -0.4), fontsize=6, color="#666666", rotation=90, va="top", ha="right")
            axes.set_yticks(range(len(rows)), [row.name for row in rows])
            axes.set_ylim(len(rows) - 0.5, -0.5)
            _bare(axes)
        for axes in list(grid.flat)[len(probes) :]:
            axes.set_visible(False)
    return buffer.getvalue()


@contextmanager
def _figure(height: float) -> Iterator[tuple[Any, io.StringIO]]:
    """A figure (height in inches), and what it is written to when the block ends."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure, buffer = Figure(figsize=(11.5, height), layout="constrained"), io.StringIO()
        yield figure, buffer
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None})


def _colours(rows: Sequence[Row]) -> list[Any]:
    import matplotlib

    colours = matplotlib.colormaps["tab10" if len(rows) <= 10 else "tab20"]
    return [colours(number) for number in range(len(rows))]


def _draw_row(axes: Any, runs: Sequence[Run], probe: str, axis: str, name: str, colour: Any, dashes: str) -> None:
    for run in runs:
        axes.plot(*curve(run, probe, axis), color=colour, linewidth=0.6, alpha=0.45, linestyle=dashes)
    if runs:
        xs, ys = mean_curve(runs, probe, axis)
        axes.plot(xs, ys, color=colour, linewidth=1.8, marker="o", markersize=3, linestyle=dashes, label=name)


def _bare(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(linewidth=0.4, alpha=0.5)
