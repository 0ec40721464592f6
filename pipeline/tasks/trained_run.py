"""What a program reads of a trained run before its weights: the checkpoint, the settings, the tokenizer, task files."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from pipeline.checkpoint.files import run_of
from pipeline.checkpoint.restore import resolve
from pipeline.config.command_line import load_config
from pipeline.config.options import Config
from pipeline.data.tokenizer import TextTokenizer, tokenizer_of
from pipeline.tasks.task import Task


class TrainedRun(NamedTuple):
    """A checkpoint that is whole, the folder of its run, and how the run was set."""

    checkpoint: Path
    folder: Path
    config: Config
    tokenizer: TextTokenizer


def read_run(path: Path) -> TrainedRun:
    """The run of a run folder (its newest checkpoint), or of one of its checkpoint folders.

    Raises:
        ValueError: the checkpoint, the settings or the tokenizer is missing or damaged; one line that says which.
    """
    checkpoint = resolve(path)
    folder = run_of(checkpoint)
    config, copy = load_config(folder), folder / "tokenizer"
    return TrainedRun(checkpoint, folder, config, tokenizer_of(config, copy if copy.is_dir() else None))


def use_files_of_run(config: Config, task: Task, folder: Path, given: Collection[str] = ()) -> None:
    """Point the options of the task, but for those ``given``, at the files that the run keeps for its model."""
    for name, option in getattr(task, "run_files", {}).items():
        if (folder / name).is_file() and option not in given:
            section, _, field = option.partition(".")
            setattr(getattr(config, section), field, str(folder / name))
