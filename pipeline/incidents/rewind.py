"""Going back: which checkpoint, which steps are gone around from there, and RUN/passed_by.json, which remembers.

The file is written before anything else changes. Until newer checkpoints are set aside it says so (``setting_aside``),
and the next start of the run finishes that first: a kill at any moment neither loses the rewind nor repeats it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data_prep.manifest import write_atomically
from pipeline.checkpoint.files import defect, published, step_of
from pipeline.incidents.records import name_checkpoint

FILE_NAME = "passed_by.json"


class RewindError(ValueError):
    """RUN/passed_by.json cannot be used, with the reason and what to do."""


@dataclass
class PassedBy:
    """What a run goes around. A person may write ``steps`` too, before a start of the run."""

    steps: list[int] = field(default_factory=list)  # 0-based: step s covers positions [s*G, (s+1)*G)
    rewinds: list[dict] = field(default_factory=list)  # from_step, to_step, bad_steps of each
    setting_aside: int | None = None  # checkpoints after this step still have to be set aside

    @classmethod
    def read(cls, run: Path) -> PassedBy:
        path = run / FILE_NAME
        try:
            content = cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, TypeError) as error:
            raise RewindError(f'{path}: cannot be read ({error}); expected {{"steps": [...]}}; mend it') from None
        if not isinstance(content.steps, list) or not all(isinstance(step, int) for step in content.steps):
            raise RewindError(f"{path}: steps: expected a list of whole numbers; mend it")
        return content

    def write(self, run: Path) -> None:
        write_atomically(run / FILE_NAME, json.dumps(asdict(self)) + "\n")


def choose_checkpoint(run: Path, first_bad: int, before: int) -> Path | None:
    """The newest valid checkpoint from ``before`` steps before step ``first_bad`` or earlier; else from before it."""
    for limit in (first_bad - before, first_bad):
        for path in reversed(published(run)):
            if step_of(path) <= limit and defect(path) is None:
                return path
    return None


def decide_rewind(run: Path, path: Path, bad_steps: Sequence[int], before: int, now: int) -> PassedBy:
    """Write down that the run goes back to ``path``, and around the batches of all steps that led to the bad ones."""
    remembered = PassedBy.read(run)
    to_step = step_of(path)
    around = range(max(bad_steps[0] - before, to_step), bad_steps[-1] + 1)
    remembered.steps = sorted({*remembered.steps, *around})
    remembered.rewinds.append({"from_step": now, "to_step": to_step, "bad_steps": list(bad_steps)})
    remembered.setting_aside = to_step
    remembered.write(run)
    return remembered


def finish_setting_aside(run: Path) -> list[str]:
    """Move checkpoints that a rewind left behind out of sight of a resume; returns their new names."""
    remembered = PassedBy.read(run)
    if remembered.setting_aside is None:
        return []
    moved = []
    for path in published(run):
        if step_of(path) > remembered.setting_aside:
            aside = f"before_rewind_{len(remembered.rewinds)}/{path.name}"
            name_checkpoint(run, path.name, aside)  # first: what an incident names must never be other weights
            target = path.parent / aside
            target.parent.mkdir(exist_ok=True)
            os.rename(path, target)
            moved.append(aside)
    remembered.setting_aside = None
    remembered.write(run)
    return moved
