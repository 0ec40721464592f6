"""What a run would write, and what is in its folder already."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from pipeline.checkpoint.changes import refuse_fewer_steps
from pipeline.checkpoint.fingerprint import accept, run_fingerprint
from pipeline.checkpoint.folders import newest_saved_step, published, step_of
from pipeline.checkpoint.restore import read_state
from pipeline.config.command_line import Launch
from pipeline.config.options import TrainConfig
from pipeline.loading.open_data import TrainingData, data_fingerprint
from pipeline.planning.speed import CHECKPOINT_BYTES
from pipeline.tasks.task import Task


def describe_folder(launch: Launch, task: Task, data: TrainingData | None) -> tuple[dict[str, Any], list[str]]:
    """The state of the run folder (``new``, ``begins``, ``resumes``, ``done``, ``another run``) with the step, and why
    the run would be refused. Nothing is verified but the state of the newest checkpoint: its tensors are not read."""
    output, config = launch.output, launch.config
    step = newest_saved_step(output)
    if step is None:
        return {"path": str(output), "state": "begins" if output.exists() else "new", "step": 0}, []
    found: dict[str, Any] = {"path": str(output), "state": "resumes", "step": step}
    try:
        newest = next(path for path in reversed(published(output)) if step_of(path) == step)
        state = read_state(newest)
        if data is None:
            return found | {"note": "whether it is the same run is not known without its data"}, []
        of_task = task.fingerprint(config) if hasattr(task, "fingerprint") else {}
        wanted = run_fingerprint(config, data_fingerprint(config, data) | of_task)
        found["changes"] = [
            f"{name}: {change}" for name, change in accept(output, state.fingerprint, wanted, config).items()
        ]
    except ValueError as error:
        return found | {"state": "another run"}, [str(error)]
    try:
        refuse_fewer_steps(output, step, config.train)
    except ValueError as error:
        return found, [str(error)]
    return found | ({"state": "done"} if step == config.train.steps else {}), []


def describe_checkpoints(output: Path, trained: int | None, train: TrainConfig, first_step: int) -> dict[str, Any]:
    """How many checkpoints of how many bytes are written, how many stay, and what is free where they go.

    Those that ``train.save_minutes`` adds are not known before; the ones of incidents come on top.
    """
    saves = count_saves(train, first_step)
    steps = [step for step in range(train.keep_every, train.steps + 1, train.keep_every)] if train.keep_every else []
    kept = min(saves, train.keep_last + len(steps) + (train.keep_best is not None))
    found: dict[str, Any] = {"saves": saves, "kept": kept, "bytes": None, "free_bytes": free_bytes(output)}
    if trained is not None:
        found["bytes"] = CHECKPOINT_BYTES * trained
        found["most_bytes"] = (kept + 1) * found["bytes"]  # the next one is written before an old one goes
    return found


def count_saves(train: TrainConfig, first_step: int) -> int:
    """Saves from ``first_step`` to the end by ``train.save_every``, the last one included."""
    last = train.steps - 1
    regular = last // train.save_every - first_step // train.save_every if train.save_every else 0
    return max(regular, 0) + (first_step < train.steps)


def nearest_folder(path: Path) -> Path:
    """``path``, or the folder above it that is there."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def free_bytes(path: Path) -> int:
    """Bytes that are free where ``path`` is or would be."""
    return shutil.disk_usage(nearest_folder(path)).free
