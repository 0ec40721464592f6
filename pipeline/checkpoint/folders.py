"""The names of checkpoint folders, for programs that must not load torch."""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = re.compile(r"step_(\d{8,})")


def step_of(path: Path) -> int | None:
    """The step in the name of a checkpoint folder, None for another name."""
    match = FOLDER.fullmatch(path.name)
    return int(match[1]) if match else None


def published(run: Path) -> list[Path]:
    """Checkpoint folders of a run by step, oldest first, not verified."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if step_of(path) is not None and path.is_dir()]
    return sorted(found, key=step_of)


def newest_saved_step(run: Path) -> int | None:
    """The step of the newest checkpoint that has a manifest, which is written last; None without one."""
    return next((step_of(path) for path in reversed(published(run)) if (path / "manifest.json").is_file()), None)
