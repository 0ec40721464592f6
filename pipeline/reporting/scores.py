"""Scores of runs as a table of plain text, for logs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.reporting.reading import evaluations_of

_HEAD = ("run", "evaluation", "step", "score", "value", "standard error")


def table_of_scores(runs: Sequence[Path]) -> str:
    """A line for each score of each evaluation, one for a run without any; raises ReportError for a bad scorecard."""
    rows = [_HEAD]
    for run in runs:
        evaluations = evaluations_of(run)
        if not evaluations:
            rows.append((run.name, "no evaluation", *[""] * 4))
        for one in evaluations:
            step = (one.card.get("checkpoint") or {}).get("step", "")
            for name, *numbers in one.measures:
                rows.append((run.name, one.title, str(step), name, *map(_short, numbers)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def _short(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
