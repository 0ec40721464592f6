"""What a program reads of a trained run before its weights: the checkpoint, the settings, the tokenizer, task files."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.checkpoint.files import run_of
from pipeline.checkpoint.restore import read_state, resolve
from pipeline.config.command_line import load_config
from pipeline.config.options import Config, ConfigError, flatten
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


def refuse_other_training(
    checkpoint: Path, config: Config, task: Task | None, tokenizer: TextTokenizer, source: str | Path
) -> None:
    """Raise ConfigError where the ``tokenizer`` of ``source``, or classes of the ``task`` (None: of no matter), are not
    those that the checkpoint was trained with."""
    trained = read_state(checkpoint).fingerprint.get("data", {})
    found: dict[str, Any] = {"tokenizer": tokenizer.fingerprint}
    places = {"tokenizer": str(source)}
    if task is not None and hasattr(task, "fingerprint"):
        found |= task.fingerprint(config)
        options = dict(flatten(config))
        places |= {Path(name).stem: options[option] for name, option in getattr(task, "run_files", {}).items()}
    for name, value in found.items():
        if trained.get(name, value) != value:
            raise ConfigError(
                f"{checkpoint} was trained with another {name} (sha256 {trained[name]}) than "
                f"{places.get(name, name)} ({value}); restore the one it was trained with"
            )
