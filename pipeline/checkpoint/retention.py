"""Which checkpoints of a run are kept: the newest, every n-th, the best, and those that an incident names."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from data_prep.manifest import write_atomically
from pipeline.checkpoint.files import checkpoint_path, published, remove, step_of

BEST_NAME = "best.json"


def steps_to_keep(
    steps: Collection[int], keep_last: int, keep_every: int, best: int | None, cited: Collection[int]
) -> set[int]:
    """Of the steps that have a checkpoint, those whose checkpoint stays."""
    newest = sorted(steps)[-keep_last:]
    regular = [step for step in steps if keep_every and step % keep_every == 0]
    return set(newest) | set(regular) | ({best, *cited} & set(steps))


def retain(run: Path, keep_last: int, keep_every: int) -> None:
    """Remove the checkpoints of a run that no rule keeps; call it once the newest one is verified."""
    paths = {step_of(path): path for path in published(run)}
    best = read_best(run)
    kept = steps_to_keep(paths, keep_last, keep_every, best["step"] if best else None, cited_steps(run))
    for step, path in paths.items():
        if step not in kept:
            remove(path)


def remove_newer(run: Path, step: int) -> None:
    """Remove the checkpoints after ``step``, to which the run has gone back."""
    for path in published(run):
        if step_of(path) > step:
            remove(path)


def cited_steps(run: Path) -> set[int]:
    """Steps of the checkpoints that RUN/incidents/*/incident.json names under "checkpoint"."""
    found = set()
    for path in (run / "incidents").glob("*/incident.json"):
        try:
            named = json.loads(path.read_bytes()).get("checkpoint")
            found.add(step_of(Path(named)))
        except (OSError, ValueError, TypeError, AttributeError):  # half-written, or without a checkpoint
            continue
    return found - {None}


def read_best(run: Path) -> dict[str, Any] | None:
    """The best held-out value that has a checkpoint: {"metric", "value", "step"}; None when there is none."""
    try:
        best = json.loads((run / "checkpoints" / BEST_NAME).read_bytes())
        if checkpoint_path(run, int(best["step"])).is_dir() and best["metric"] and best["value"] is not None:
            return best
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def write_best(run: Path, best: dict[str, Any]) -> None:
    """Record the best checkpoint in RUN/checkpoints/best.json; raises OSError."""
    write_atomically(run / "checkpoints" / BEST_NAME, json.dumps(best))
