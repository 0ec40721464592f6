"""The page that compares runs: how they ended, scores, curves, samples, costs, and the settings that differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_prep.manifest import write_atomically
from pipeline.comparing.curves import AXES, figures, not_on
from pipeline.comparing.facts import cost_rows, differing_settings, state_rows
from pipeline.comparing.runs import Compared, group_runs, load_runs
from pipeline.comparing.samples import same_samples
from pipeline.comparing.scores import scorecards
from pipeline.reporting.page import template
from pipeline.reporting.reading import ReportError

COMPARISON_NAME = "comparison.html"


def write_comparison(run_dirs: Sequence[Path], path: Path) -> Path:
    """Write the page that compares runs to ``path``.

    Raises:
        ReportError: a folder that is no run, one given twice, too many or too few, or nothing that two of them share.
    """
    runs = load_runs(run_dirs)
    groups = group_runs(runs)
    drawn, cards, samples = figures(groups), scorecards(groups), same_samples(runs)
    if not drawn and not cards and not samples:
        names = ", ".join(one.label for one in runs)
        raise ReportError(
            f"{names}: no training loss, no held-out number, no evaluation and no sample that two of them share; "
            "nothing to compare"
        )
    axes = {key: said for key, said in AXES.items() if any(key == k for one in drawn for k, _ in one.drawn)}
    page = template("comparison.html.j2").render(
        runs=runs,
        groups=groups,
        names=[one.label for one in runs],
        notes=_notes(runs),
        states=state_rows(runs),
        costs=cost_rows(runs),
        settings=differing_settings(runs),
        axes=axes,
        missing={key: not_on(key, runs) for key in axes},
        figures=drawn,
        cards=cards,
        sources=samples,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page)
    return path


def _notes(runs: Sequence[Compared]) -> list[str]:
    """What a reader must know before comparing."""
    notes = []
    for what, option in (("tasks", "task.name"), ("objectives", "objective.name")):
        found = dict.fromkeys(str(value) for one in runs if (value := one.run.setting(option)) is not None)
        if len(found) > 1:
            notes.append(f"The runs have other {what} ({', '.join(found)}); what they share in name is compared.")
    for one in runs:
        if not one.run.train:
            notes.append(f"{one.label} has logged no training step.")
        elif one.run.course.ending.startswith("still"):
            notes.append(f"{one.label} is {one.run.course.ending}; the page shows what it has written so far.")
    return notes
