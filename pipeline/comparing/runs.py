"""The runs of a comparison: read, named, and put into groups where all settings but the seed are equal."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.checkpoint.folders import published
from pipeline.config.options import leaves
from pipeline.reporting.evaluations import Evaluation
from pipeline.reporting.figures import NUM_COLOURS
from pipeline.reporting.reading import ReportError, Run, evaluations_of, load_run

MOST_RUNS = 24
PLACES = ("data.paths", "data.tokenizer")  # settings that name places; where checkpoints tell the content, that counts
WITHOUT_EFFECT = (  # on what is computed: beginnings and endings of names of settings
    *("tracking.", "data.num_workers", "data.prefetch", "data.stage_", "data.timeout_seconds", "guard.save_incident"),
    *("train.log_every", "train.save_", "train.async_save", "train.keep_last", "train.keep_every"),
)
_TIMEOUT = "_timeout_minutes"


@dataclass
class Compared:
    """A run and its evaluations under the name that it has on the page; ``data`` is what it read, by content."""

    label: str
    run: Run
    evaluations: list[Evaluation] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    colour: int = 0


@dataclass
class Group:
    """Runs whose settings are equal but for the seed; they share a colour."""

    label: str
    colour: int
    runs: list[Compared]


def load_runs(run_dirs: Sequence[Path]) -> list[Compared]:
    """Raises ReportError, in one line, for a folder that is no run, one given twice, too many or too few."""
    if not 2 <= len(run_dirs) <= MOST_RUNS:
        raise ReportError(f"--runs names {len(run_dirs)} runs, expected 2 to {MOST_RUNS}")
    resolved = [Path(run).resolve() for run in run_dirs]
    found = []
    for given, run_dir in zip(run_dirs, resolved, strict=True):
        if resolved.count(run_dir) > 1:
            raise ReportError(f"--runs names {given} twice")
        if not run_dir.is_dir():
            raise ReportError(f"{given} is not a folder; give the --output of training runs")
        run, evaluations = load_run(run_dir), evaluations_of(run_dir)
        if run.is_empty and not evaluations:
            raise ReportError(f"{given} is no run: neither config.yaml nor log.jsonl nor evaluations in it")
        names = [one.name for one in resolved]
        label = run_dir.name if names.count(run_dir.name) == 1 else f"{run_dir.parent.name}/{run_dir.name}"
        found.append(Compared(label, run, evaluations, _data_of(run_dir)))
    labels = [one.label for one in found]
    for number, one in enumerate(found, 1):
        one.label = one.label if labels.count(one.label) == 1 else f"{one.label} ({number})"
    return found


def group_runs(runs: Sequence[Compared]) -> list[Group]:
    """Groups in the order of their first runs, which get their colours.

    Raises ReportError where there are more groups than colours.
    """
    groups: list[Group] = []
    for one in runs:
        same = next((group for group in groups if _are_equal(group.runs[0], one)), None)
        if same is None:
            same = Group("", len(groups), [])
            groups.append(same)
        same.runs.append(one)
        one.colour = same.colour
    if len(groups) > NUM_COLOURS:
        found = f"--runs names {len(groups)} runs that differ in more than the seed"
        raise ReportError(f"{found}, expected {NUM_COLOURS} at most; compare fewer at a time")
    for group in groups:
        group.label = _label([one.label for one in group.runs])
    return groups


def _are_equal(one: Compared, other: Compared) -> bool:
    if not one.run.config or not other.run.config:
        return False  # nothing is known of its settings
    known = bool(one.data and other.data)
    if known and one.data != other.data:
        return False
    precision = [run.environment.get("precision") for run in (one.run, other.run)]
    settings = [
        {name: value for name, value in leaves(run.config) if _counts(name) and not (known and name in PLACES)}
        for run in (one.run, other.run)
    ]
    return precision[0] == precision[1] and settings[0] == settings[1]


def _counts(name: str) -> bool:
    return not (name == "train.seed" or name.startswith(WITHOUT_EFFECT) or name.endswith(_TIMEOUT))


def _label(labels: Sequence[str]) -> str:
    """Of a group what its names begin with, and how many it holds: flm_seed1 and flm_seed2 are "flm, 2 runs"."""
    if len(labels) == 1:
        return labels[0]
    common = re.sub(r"[-_. ]*(seed|run|s|r)?[-_. ]*\d*$", "", os.path.commonprefix(labels))
    return f"{common or labels[0]}, {len(labels)} runs"


def _data_of(run_dir: Path) -> dict[str, Any]:
    """Corpora and tokenizer by content, as the newest checkpoint tells; {} where it does not."""
    for folder in reversed(published(run_dir)):
        try:
            data = json.loads((folder / "state.json").read_text(encoding="utf-8"))["fingerprint"]["data"]
            return {name: data[name] for name in ("corpora", "weights", "tokenizer") if name in data}
        except (OSError, ValueError, KeyError, TypeError):
            continue  # being written, or of an older version: the one before may tell
    return {}


def said_of_data(data: Mapping[str, Any]) -> str:
    """Corpora with their rows and the beginning of their fingerprints, for people."""
    corpora = data.get("corpora")
    if not isinstance(corpora, Mapping):
        return ""
    return ", ".join(
        f"{name.partition(' ')[2] or name}: {one.get('rows', '?'):,} rows, {str(one.get('content', ''))[:8]}"
        for name, one in corpora.items()
        if isinstance(one, Mapping)
    )
