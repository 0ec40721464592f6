"""What is evaluated: a run, one of its checkpoints or an imported model, with its configuration and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from data_prep.manifest import file_sha256
from pipeline.checkpoint.files import MANIFEST, run_of, step_of
from pipeline.checkpoint.restore import read_state, resolve
from pipeline.config.command_line import changed_options, load_config, parse_command_line
from pipeline.config.options import Config, ConfigError, flatten, tokenizer_source, validate
from pipeline.config.task_options import names_of_scoring
from pipeline.data.tokenizer import TextTokenizer
from pipeline.tasks.task import Task
from pipeline.weights.importing import REPORT_NAME
from pipeline.weights.sources import IMPORT_RECIPE, IMPORTED, load_whole
from pipeline.weights.starting import load_trained

EVALUATIONS = "evaluations"
OF_LOADING = ("data.num_workers", "data.prefetch", "data.timeout_seconds")  # change no batch


@dataclass(frozen=True)
class Request:
    """What a command line asks for; None is as the run has it. ``options`` are further words, --task.OPTION VALUE."""

    run: Path
    task: str | None = None
    data: Sequence[str] | None = None
    split: str | None = None
    samples: int | None = None
    batch_size: int | None = None
    submission: bool = False
    output: Path | None = None
    options: Sequence[str] = ()


@dataclass(frozen=True)
class Subject:
    """A model: its folder, hash and configuration, and the folder ``root`` for evaluations of it.

    ``step`` and ``run`` are None for an imported model; ``same_task`` says whether it was trained for the task that it
    is asked to do; ``given`` are the options of the command line.
    """

    path: Path
    step: int | None
    sha256: str
    run: Path | None
    config: Config
    tokenizer: str | Path
    root: Path
    same_task: bool
    given: frozenset[str]


def find_subject(request: Request) -> Subject:
    """The model that a command line names, whole, with the options that it gives.

    Raises:
        ValueError: there is none, or it has no such option; one line.
    """
    return _imported(request) if (request.run / IMPORTED).is_file() else _trained(request)


def _trained(request: Request) -> Subject:
    path = resolve(request.run)
    run = run_of(path)
    own = load_config(run)
    name = request.task or own.task.name
    given = changed_options(request.options)
    changes = changed_options([*request.options, *_asked(request), "--task.name", name])
    may = OF_LOADING if name != own.task.name else (*OF_LOADING, *(f"task.{one}" for one in names_of_scoring(own.task)))
    for option in given:
        if option not in may and not (name != own.task.name and option.startswith("task.")):
            raise ConfigError(
                f"--{option}: belongs to what was trained, as {run / 'config.yaml'} says; an evaluation may change "
                f"{', '.join(may)}"
            )
    config = load_config(run, changes)
    copy = run / "tokenizer"
    tokenizer = copy if copy.is_dir() else tokenizer_source(own.data)
    root = request.output or run / EVALUATIONS
    sha256 = file_sha256(path / MANIFEST)
    config, same = _set(config, request), name == own.task.name
    return Subject(path, step_of(path), sha256, run, config, tokenizer, root, same, frozenset(given))


def _imported(request: Request) -> Subject:
    folder = request.run
    if request.output is None:
        raise ConfigError(f"{folder} is an imported model, no run: --output FOLDER says where its scorecards go")
    try:
        trained_for = json.loads((folder / REPORT_NAME).read_text(encoding="utf-8"))["task"] or "pretraining"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / REPORT_NAME} can't be read ({error}); import the checkpoint again") from None
    name = request.task or trained_for
    words = ["--recipe", str(folder / IMPORT_RECIPE), *request.options, *_asked(request), "--task.name", name]
    config = _set(parse_command_line(words).config, request)
    sha256, tokenizer = file_sha256(folder / IMPORTED), tokenizer_source(config.data)
    given = frozenset(changed_options(request.options))
    return Subject(folder, None, sha256, None, config, tokenizer, request.output, name == trained_for, given)


def _asked(request: Request) -> list[str]:
    """The command line's words for a run's options."""
    words = ["--data", *request.data] if request.data else []
    words += ["--data.eval_split", request.split] if request.split else []
    return words + (["--optim.micro_batch_size", str(request.batch_size)] if request.batch_size else [])


def _set(config: Config, request: Request) -> Config:
    config.train.eval_samples = request.samples
    validate(config)
    return config


def use_files_of_run(subject: Subject, task: Task) -> None:
    """Point the options of the task, unless they are given, at the files that the run keeps for its model."""
    for name, option in getattr(task, "run_files", {}).items():
        has_it = subject.run is not None and subject.same_task and (subject.run / name).is_file()
        if has_it and option not in subject.given:
            section, _, field = option.partition(".")
            setattr(getattr(subject.config, section), field, str(subject.run / name))


def load_weights(subject: Subject, objective: nn.Module) -> None:
    """Give a model all weights of the subject; heads of another task are left out, but for one of the same purpose.

    Raises:
        ValueError: they do not fit, a head is missing, or frozen weights are no longer those it was trained with.
    """
    if subject.run is not None and subject.same_task:
        load_trained(objective, subject.config.model, subject.path)
        return
    load_whole(objective, str(subject.path))


def refuse_other_training(subject: Subject, task: Task, tokenizer: TextTokenizer) -> None:
    """Raise ConfigError where words or classes are not those that the checkpoint was trained with."""
    trained = read_state(subject.path).fingerprint.get("data", {}) if subject.run is not None else {}
    found: dict[str, Any] = {"tokenizer": tokenizer.fingerprint}
    if subject.same_task and hasattr(task, "fingerprint"):
        found |= task.fingerprint(subject.config)
    options = dict(flatten(subject.config))
    places = {name: str(subject.tokenizer) for name in ("tokenizer",)}
    places |= {Path(name).stem: options[option] for name, option in getattr(task, "run_files", {}).items()}
    for name, value in found.items():
        if trained.get(name, value) != value:
            raise ConfigError(
                f"{subject.path} was trained with another {name} (sha256 {trained[name]}) than "
                f"{places.get(name, name)} ({value}); restore the one it was trained with"
            )
