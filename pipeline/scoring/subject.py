"""What is evaluated: a run, one of its checkpoints or an imported model, with its configuration and tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from data_prep.manifest import file_sha256
from pipeline.checkpoint.files import MANIFEST, run_of, step_of
from pipeline.checkpoint.restore import resolve
from pipeline.config.command_line import changed_options, load_config
from pipeline.config.options import Config, ConfigError, validate
from pipeline.config.recipes import RUN_CONFIG
from pipeline.config.task_options import names_of_scoring
from pipeline.data.tokenizer import TextTokenizer
from pipeline.data.tokenizer_source import tokenizer_source
from pipeline.exported.folder import MANIFEST as EXPORTED
from pipeline.exported.folder import is_exported
from pipeline.tasks import trained_run
from pipeline.tasks.task import Task
from pipeline.weights.sources import IMPORT_RECIPE, IMPORTED, import_config, is_import, load_whole
from pipeline.weights.starting import load_trained

EVALUATIONS = "evaluations"
OF_LOADING = ("data.num_workers", "data.prefetch", "data.timeout_seconds")  # change no batch
OF_IMAGES = ("data.features",)  # stored features are rounded; they are part of the evaluation's identity
OF_TEXT = ("data.tokenizer", "data.max_text_length")  # an imported model does not say how it reads


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
    imported = is_import(request.run)
    if imported and request.output is None:
        raise ConfigError(f"{request.run} is an imported model, no run: --output FOLDER says where its scorecards go")
    path = request.run if imported else resolve(request.run)
    run = None if imported else run_of(path)
    exported = is_exported(path)
    settings = path / IMPORT_RECIPE if run is None else path if exported else run / RUN_CONFIG
    own = import_config(path) if run is None else load_config(run)
    name = request.task or own.task.name
    given = changed_options(request.options)
    config = load_config(settings, changed_options([*request.options, *_asked(request), "--task.name", name]))
    _refuse_what_was_trained(given, own, name, settings, imported)
    config.model.weights, config.train.eval_samples = own.model.weights, request.samples
    validate(config)
    copy = None if run is None else run / "tokenizer"
    return Subject(
        path=path,
        step=step_of(path),
        sha256=file_sha256(path / (IMPORTED if run is None else EXPORTED if exported else MANIFEST)),
        run=run,
        config=config,
        tokenizer=copy if copy and copy.is_dir() else tokenizer_source(config if run is None else own),
        root=request.output or run / EVALUATIONS,
        same_task=name == own.task.name,
        given=frozenset(given),
    )


def _refuse_what_was_trained(given: Iterable[str], own: Config, task: str, settings: Path, imported: bool) -> None:
    """Raise ConfigError for an option that an evaluation may not change.

    A run may be scored in another way at the task that it was trained for; an imported model, or another task, has no
    options of its own yet.
    """
    may = [*OF_LOADING, *OF_IMAGES, *(f"task.{option}" for option in names_of_scoring(own.task))]
    may += OF_TEXT if imported else ()
    for option in given:
        is_free = option.startswith("task.") and option != "task.name" and (imported or task != own.task.name)
        if option not in may and not is_free:
            raise ConfigError(
                f"--{option}: {settings} says what was trained; an evaluation may change {', '.join(may)}"
            )


def _asked(request: Request) -> list[str]:
    """The command line's words for a run's options."""
    words = ["--data", *request.data] if request.data else []
    words += ["--data.eval_split", request.split] if request.split else []
    return words + (["--optim.micro_batch_size", str(request.batch_size)] if request.batch_size else [])


def use_files_of_run(subject: Subject, task: Task) -> None:
    """Point the options of the task, unless they are given, at the files that the run keeps for its model."""
    if subject.run is not None and subject.same_task:
        trained_run.use_files_of_run(subject.config, task, subject.run, subject.given)


def load_weights(subject: Subject, objective: nn.Module) -> None:
    """Give a model all weights of the subject; heads of another task are left out.

    Raises:
        ValueError: they do not fit, a head is missing, or frozen weights are no longer those it was trained with.
    """
    if subject.run is not None and subject.same_task:
        load_trained(objective, subject.config.model, subject.path)
    else:
        load_whole(objective, str(subject.path))


def refuse_other_training(subject: Subject, task: Task, tokenizer: TextTokenizer) -> None:
    """Raise ConfigError where words or classes are not those that the checkpoint was trained with."""
    if subject.run is not None:
        of_classes = task if subject.same_task else None
        trained_run.refuse_other_training(subject.path, subject.config, of_classes, tokenizer, subject.tokenizer)
