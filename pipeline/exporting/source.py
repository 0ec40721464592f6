"""What is exported: a checkpoint of a run, or an imported model, with its settings, tokenizer and files."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from data_prep.manifest import file_sha256
from pipeline.checkpoint.files import MANIFEST, checkpoint_path, run_of
from pipeline.checkpoint.restore import read_state, resolve
from pipeline.checkpoint.state import RunState
from pipeline.config.command_line import load_config
from pipeline.config.options import Config, ConfigError, flatten
from pipeline.data.tokenizer import TextTokenizer, tokenizer_of
from pipeline.exported.folder import is_exported
from pipeline.finetuning.table import task_of
from pipeline.tasks.task import Task
from pipeline.weights.sources import IMPORTED, import_config, is_import
from pipeline.weights.starting import load_trained

ENVIRONMENT, SCORECARDS = "environment.json", "evaluations/*/scorecard.json"


@dataclass
class Source:
    """A model to export. ``checkpoint`` is the folder of its weights, ``folder`` that of its run (of an imported model
    both are the same)."""

    name: str
    folder: Path
    checkpoint: Path
    config: Config
    task: Task
    tokenizer: TextTokenizer
    tokenizer_folder: str | Path
    state: RunState
    sha256: str
    environment: dict[str, Any] = field(default_factory=dict)
    scorecards: list[dict[str, Any]] = field(default_factory=list)

    def load(self) -> nn.Module:
        """The model with all its weights, in evaluation mode; raises ValueError where they do not fit."""
        return load_model(self.config, self.task, self.tokenizer, self.checkpoint)

    @property
    def files(self) -> dict[str, tuple[Path, str]]:
        """Files that belong to the loaded model, by name: where each is, and the option that names it."""
        named = getattr(self.task, "run_files", {})
        options = dict(flatten(self.config))
        return {name: (Path(options[one]), one) for name, one in named.items() if options.get(one) is not None}


def load_model(config: Config, task: Task, tokenizer: TextTokenizer, checkpoint: Path) -> nn.Module:
    """The model of a task with the weights of a checkpoint, an import or an exported folder, on the host."""
    objective = task.build(config, tokenizer.vocabulary)
    load_trained(objective, config.model, checkpoint)
    return objective.eval()


def find_source(run: Path, step: int | None = None, tokenizer: str | None = None) -> Source:
    """The model that a command line names; ``tokenizer`` is for an imported one, which has none of its own.

    Raises:
        ValueError: there is none, or it is damaged; one line.
    """
    imported = is_import(run)
    if not imported and is_exported(run):
        raise ConfigError(f"{run} is an exported folder already; copy it, or name the run it was made from")
    if imported and step is not None:
        raise ConfigError(f"{run} is an imported model, which has no checkpoints; leave --checkpoint out")
    if tokenizer is not None and not imported:
        raise ConfigError(f"--tokenizer is for imported models; {run} has the one that it was trained with")
    checkpoint = run if imported else resolve(run if step is None else checkpoint_path(run, step))
    folder = run if imported else run_of(checkpoint)
    config = import_config(run) if imported else load_config(folder)
    if tokenizer is not None:
        config.data.tokenizer = tokenizer
    copy = folder / "tokenizer"
    read = tokenizer_of(config, copy if copy.is_dir() else None)
    task = task_of(config)
    _use_files_of_run(folder, config, task)
    return Source(
        name=folder.resolve().name,
        folder=folder,
        checkpoint=checkpoint,
        config=config,
        task=task,
        tokenizer=read,
        tokenizer_folder=read.source,
        state=RunState() if imported else read_state(checkpoint),
        sha256=file_sha256(checkpoint / (IMPORTED if imported else MANIFEST)),
        environment=_read(folder / ENVIRONMENT),
        scorecards=_scorecards(folder, None if imported else read_state(checkpoint).step),
    )


def _use_files_of_run(folder: Path, config: Config, task: Task) -> None:
    """Point the options of the task at the copies that the run keeps for its model."""
    for name, option in getattr(task, "run_files", {}).items():
        if (folder / name).is_file():
            section, _, key = option.partition(".")
            setattr(getattr(config, section), key, str(folder / name))


def _scorecards(folder: Path, step: int | None) -> list[dict[str, Any]]:
    """The scorecards of this checkpoint, in order of name."""
    found = [_read(path) for path in sorted(folder.glob(SCORECARDS))]
    return [one for one in found if _step_of(one) == step and isinstance(one.get("metrics"), dict)]


def _step_of(scorecard: dict[str, Any]) -> int | None:
    checkpoint = scorecard.get("checkpoint")
    return checkpoint.get("step") if isinstance(checkpoint, dict) else None


def _read(path: Path) -> dict[str, Any]:
    """A JSON object that only the card repeats; empty where there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
