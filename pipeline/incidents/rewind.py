"""Rewinds a run: chooses the checkpoint to return to and records the skipped batches in RUN/passed_by.json.

The file is written before anything else changes. Its entry ``setting_aside`` stands until the newer checkpoints are
moved away, which the next start of the run finishes: a kill at any moment neither loses nor repeats a rewind.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data_prep.manifest import write_atomically
from pipeline.checkpoint.files import published, step_of
from pipeline.incidents.records import name_checkpoint

FILE_NAME = "passed_by.json"


class RewindError(ValueError):
    """RUN/passed_by.json is unusable; the message gives the reason and what to do."""


@dataclass
class SkippedBatches:
    """The skipped batches of a run, as RUN/passed_by.json; a person may add ``steps`` before a start of the run."""

    steps: list[int] = field(default_factory=list)  # steps whose batch is skipped, from 0: positions [s*G, (s+1)*G)
    rewinds: list[dict] = field(default_factory=list)  # from_step, to_step and bad_steps of each
    setting_aside: int | None = None  # checkpoints after this step still have to be moved away

    @classmethod
    def read(cls, run: Path) -> SkippedBatches:
        path = run / FILE_NAME
        try:
            content = cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, TypeError) as error:
            raise RewindError(f'{path}: cannot be read ({error}); expected {{"steps": [...]}}; fix it') from None
        if not isinstance(content.steps, list) or not all(isinstance(step, int) for step in content.steps):
            raise RewindError(f"{path}: steps: expected a list of whole numbers; fix it")
        return content

    def write(self, run: Path) -> None:
        write_atomically(run / FILE_NAME, json.dumps(asdict(self)) + "\n")


def ways_back(run: Path, first_bad: int, before: int) -> list[Path]:
    """Checkpoints to go back to, not verified, the best first: the newest that are at least ``before`` steps before
    step ``first_bad``, then the newest of the others before it."""
    older = [path for path in reversed(published(run)) if step_of(path) <= first_bad]
    return sorted(older, key=lambda path: step_of(path) > first_bad - before)


def decide_rewind(run: Path, path: Path, bad_steps: Sequence[int], before: int, now: int) -> SkippedBatches:
    """Record a rewind from step ``now`` to the checkpoint ``path``, with the batches to skip from there.

    These are the batches of the bad steps, of all steps between them and of up to ``before`` steps before the first.
    """
    record = SkippedBatches.read(run)
    to_step = step_of(path)
    skipped = range(max(bad_steps[0] - before, to_step), bad_steps[-1] + 1)
    record.steps = sorted({*record.steps, *skipped})
    record.rewinds.append({"from_step": now, "to_step": to_step, "bad_steps": list(bad_steps)})
    record.setting_aside = to_step
    record.write(run)
    return record


def finish_setting_aside(run: Path) -> list[str]:
    """Move the checkpoints newer than a rewind's target where no resume finds them; returns their new names."""
    record = SkippedBatches.read(run)
    if record.setting_aside is None:
        return []
    moved = []
    for path in published(run):
        if step_of(path) > record.setting_aside:
            aside = f"before_rewind_{len(record.rewinds)}/{path.name}"
            name_checkpoint(run, path.name, aside)  # first, so that no incident ever names other weights
            target = path.parent / aside
            target.parent.mkdir(exist_ok=True)
            os.rename(path, target)
            moved.append(aside)
    record.setting_aside = None
    record.write(run)
    return moved
