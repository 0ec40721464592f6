"""Carries out one evaluation on any number of ranks, each with a copy of the model, and goes on with a killed one."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_prep.manifest import write_atomically
from pipeline.config.options import Config, ConfigError, to_plain
from pipeline.data.shard_reader import Corpus
from pipeline.data.tokenizer import TextTokenizer, tokenizer_of
from pipeline.data.transforms import TRANSFORM_VERSION
from pipeline.distributed.board import Board
from pipeline.distributed.connecting import Ranks
from pipeline.distributed.run_lock import lock_run
from pipeline.finetuning.table import task_of
from pipeline.loading.datasets import Preparation
from pipeline.loading.open_data import open_held_out
from pipeline.loading.shared_opening import found_by_main
from pipeline.recording.environment import describe_environment
from pipeline.recording.progress import Progress
from pipeline.scoring import scorecard
from pipeline.scoring.examples import write_examples
from pipeline.scoring.journal import Journal, read_journal, remove_journal
from pipeline.scoring.subject import (
    Request,
    Subject,
    find_subject,
    load_weights,
    refuse_other_training,
    use_files_of_run,
)
from pipeline.stored_features.opening import feature_source
from pipeline.tasks.evaluation import BatchRecord, Outcome, run_passes
from pipeline.tasks.task import EvaluationPass, EvaluationRanks, Task, texts_of

IDENTITY = "evaluation.json"  # what an evaluation is of, and how: the same for all processes that work on it


@dataclass
class Evaluation:
    """An evaluation ready to be carried out. On rank 0: its folder's lock, what earlier processes found, by pass, and
    how often the test split was evaluated before."""

    request: Request
    subject: Subject
    task: Task
    objective: nn.Module
    corpora: list[Corpus]
    preparation: Preparation
    passes: list[EvaluationPass]
    ranks: Ranks
    board: Board
    folder: Path
    identity: dict[str, Any]
    lock: int | None = None
    finished: Mapping[int, list[BatchRecord]] = field(default_factory=dict)
    tests_before: int | None = None

    @property
    def num_items(self) -> int:
        return len(self.passes[0].batches.dataset)

    @property
    def num_to_do(self) -> int:
        """Items of all passes: images to caption, and then captions to read, for instance."""
        return sum(len(one.batches.dataset) for one in self.passes)

    def failure(self, error: BaseException) -> BaseException | None:
        """What went wrong in loading, if ``error`` comes from there."""
        return next(filter(None, (one.batches.failure(error) for one in self.passes)), None)

    def close(self) -> None:
        """End the loader's processes, and leave the folder to others."""
        for one in self.passes:
            one.batches.close()
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None


def set_up(request: Request, ranks: Ranks, store: Any = None, task: Task | None = None) -> Evaluation:
    """Open model and data, and the folder of the evaluation, with what is there of it; every rank must call it.

    ``store`` is the one at which the ranks met; ``task`` the one that the configuration names, if not given.

    Raises:
        ValueError: anything a user can mend, in one line.
    """
    agreement, device = ranks.agreement, ranks.device
    subject = found_by_main(lambda: find_subject(request), agreement)
    config = subject.config
    task = task or task_of(config)
    refuse_submission(request, task, config.task.name)
    use_files_of_run(subject, task)
    tokenizer = tokenizer_of(config, subject.tokenizer)
    found_by_main(lambda: refuse_other_training(subject, task, tokenizer), agreement)
    corpora = open_held_out(config, task.num_images, agreement, texts_of(task))
    if not corpora:
        raise ConfigError(
            f"no split {config.data.eval_split!r} in {', '.join(config.data.paths)}; give --data or --split"
        )
    objective = task.build(config, tokenizer.vocabulary)
    found_by_main(lambda: load_weights(subject, objective), agreement)
    if not agreement.is_main:  # after rank 0, which may have fetched something into a cache
        load_weights(subject, objective)
    objective.eval().to(device)
    features = feature_source(config, objective, agreement, corpora)
    preparation = replace(task.preparation(config, objective, tokenizer), features=features)
    evaluating = EvaluationRanks(ranks.place, device.type == "cuda")
    passes = task.passes(config, objective, preparation, corpora, evaluating)
    board = Board(store, agreement)
    evaluation = Evaluation(
        request, subject, task, objective, corpora, preparation, passes, ranks, board, subject.root, {}
    )
    evaluation.folder = found_by_main(lambda: _open_folder(evaluation, tokenizer), agreement)
    return evaluation


def _open_folder(evaluation: Evaluation, tokenizer: TextTokenizer) -> Path:
    """On rank 0: the folder of this evaluation and no other, locked, and read if an earlier process worked in it."""
    identity = json.loads(json.dumps(_identity(evaluation, tokenizer)))
    root, name = evaluation.subject.root, _name(evaluation, identity)
    try:
        root.mkdir(parents=True, exist_ok=True)
        folder = root / name
        if _read_identity(folder) not in (None, identity):
            folder = root / f"{name}-{_hash(identity)[:8]}"
        evaluation.lock = lock_run(folder, doing="evaluated")
        evaluation.identity = identity
        evaluation.finished, torn = read_journal(folder)
        begun = folder / "parts" / "begun.json"
        if not begun.is_file():
            before = scorecard.count_test(root, identity["split"], identity["corpora"], folder.name)
            write_atomically(folder / IDENTITY, json.dumps(identity, indent=1) + "\n")
            begun.parent.mkdir(exist_ok=True)
            write_atomically(begun, json.dumps({"tests_before": before}) + "\n")
        evaluation.tests_before = json.loads(begun.read_text(encoding="utf-8"))["tests_before"]
    except OSError as error:
        raise ConfigError(
            f"{error.filename or root}: {error.strerror or error}; scorecards go to {root}, --output names another "
            "folder"
        ) from None
    _say_where_it_goes_on(evaluation, folder, torn)
    return folder


def _say_where_it_goes_on(evaluation: Evaluation, folder: Path, torn: int) -> None:
    found = sum(len(record.positions) for records in evaluation.finished.values() for record in records)
    if found:
        total = evaluation.num_to_do
        cut = f"; {torn} lines were cut off" if torn else ""
        evaluation.ranks.say(f"{folder.name} goes on: {found:,} of {total:,} items are done{cut}", error=True)
    if evaluation.tests_before:
        evaluation.ranks.say(
            f"the split {evaluation.identity['split']} was evaluated {evaluation.tests_before} times before in "
            f"{folder.parent}: choose settings and checkpoints by another split",
            error=True,
        )


def _identity(evaluation: Evaluation, tokenizer: TextTokenizer) -> dict[str, Any]:
    """Everything that decides what the scorecard says, besides time and topology."""
    subject, config, task = evaluation.subject, evaluation.subject.config, evaluation.task
    options = to_plain(config.task)
    for option in getattr(task, "run_files", {}).values():
        options.pop(option.partition(".")[2], None)  # a path; the protocol has what is in the file
    return {
        "task": config.task.name,
        "options": options,
        "protocol": task.protocol(config) if hasattr(task, "protocol") else {},
        "split": config.data.eval_split,
        "corpora": {
            f"{corpus.name}/{number}": {"rows": len(corpus), "fingerprint": corpus.fingerprint}
            for number, corpus in enumerate(evaluation.corpora)
        },
        "samples": config.train.eval_samples,
        "items": [len(one.batches.dataset) for one in evaluation.passes],  # what positions in the journal count
        "seed": config.train.seed,
        "batch_size": config.optim.micro_batch_size,
        "checkpoint": subject.sha256,
        "tokenizer": tokenizer.fingerprint,
        "max_text_length": config.data.max_text_length,
        "images": _images(config),
        "device": evaluation.ranks.device.type,
    }


def _images(config: Config) -> dict[str, Any]:
    return {
        "version": TRANSFORM_VERSION,
        "size": config.model.vision.image_size,
        "fast_decode": config.data.fast_decode,
        "max_pixels": config.data.max_pixels,
        "features": config.data.features,
    }


def _name(evaluation: Evaluation, identity: Mapping[str, Any]) -> str:
    """TASK-CORPUS-SPLIT[-step_N][-DECODING][-IMAGES]."""
    names = list(dict.fromkeys(corpus.name for corpus in evaluation.corpora))
    corpora = "+".join(names) if len(names) < 4 else f"{names[0]}+{len(names) - 1}_more"
    step = evaluation.subject.step
    parts = [identity["task"], corpora, identity["split"], *([] if step is None else [f"step_{step}"])]
    decoding, images = identity["protocol"].get("decoding"), identity["options"].get("images", "own")
    return "-".join([*parts, *([decoding["name"]] if decoding else []), *([] if images == "own" else [images])])


def _read_identity(folder: Path) -> Any:
    try:
        return json.loads((folder / IDENTITY).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}  # of nothing


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class _Course:
    """Keeps every batch in the journal; ranks do not wait for each other before the end of a pass."""

    def __init__(self, evaluation: Evaluation, journal: Journal) -> None:
        self._evaluation, self._journal = evaluation, journal
        found = [record for records in evaluation.finished.values() for record in records]
        start = sum(len(record.positions) for record in found)
        if evaluation.ranks.place.is_main:
            evaluation.board.advance(start)
        is_main = evaluation.ranks.place.is_main
        self._progress = Progress(evaluation.num_to_do, start, unit="item", enabled=is_main)

    def finished(self, number: int) -> list[BatchRecord]:
        return list(self._evaluation.finished.get(number, ()))

    def add(self, number: int, record: BatchRecord) -> BatchRecord:
        record = self._journal.add(number, record)
        self._progress.update(self._evaluation.board.advance(len(record.positions)))
        return record

    def stopped(self) -> bool:
        return self._evaluation.board.stopped(self._evaluation.ranks.stop.requested)

    def wait(self, number: int) -> None:
        self._evaluation.board.wait_for_all(f"pass {number}", lambda: self._evaluation.ranks.stop.requested)

    def close(self) -> None:
        self._progress.close()
        self._journal.close()


def carry_out(evaluation: Evaluation) -> dict[str, float] | None:
    """Score all items and write the scorecard; the values by name, None when told to stop. Every rank must call it.

    Raises:
        ConfigError: the submission has a hole; scorecard and predictions are written all the same.
    """
    began = time.perf_counter()
    ranks, folder, objective = evaluation.ranks, evaluation.folder, evaluation.objective
    course = _Course(evaluation, Journal(folder, ranks.place.rank))
    try:
        with torch.no_grad():
            outcome = run_passes(
                lambda function, batch: function(objective, batch.to(ranks.device)),
                evaluation.passes,
                ranks.agreement,
                course,
                folder,
            )
    finally:
        course.close()
    if outcome is None:
        ranks.say(f"stopped; what is done stays in {folder}, the same command goes on from there", error=True)
        return None
    seconds = time.perf_counter() - began
    found_by_main(lambda: _write(evaluation, outcome, seconds), ranks.agreement)
    return outcome.values


def _write(evaluation: Evaluation, outcome: Outcome, seconds: float) -> None:
    folder = evaluation.folder
    try:
        if outcome.predictions:
            scorecard.write_predictions(folder, outcome.predictions)
        scorecard.write_scorecard(folder, _scorecard(evaluation, outcome, seconds))
        evaluation.ranks.say(f"scorecard: {folder / scorecard.SCORECARD}", error=True)
        if evaluation.request.submission:
            evaluation.ranks.say(f"submission: {_submit(evaluation, outcome)}", error=True)
        _show(evaluation, outcome)
        remove_journal(folder)
    except OSError as error:
        raise ConfigError(
            f"{error.filename or folder}: cannot be written ({error.strerror or error}); mend it, then the same "
            "command goes on"
        ) from None


def _show(evaluation: Evaluation, outcome: Outcome) -> None:
    """Write what the report shows; a scorecard is not lost with it."""
    parts = evaluation.objective, evaluation.preparation, evaluation.corpora
    rows, config = evaluation.passes[0].batches.dataset.rows(), evaluation.subject.config
    try:
        write_examples(evaluation.folder, config.task.name, config, *parts, rows, outcome.predictions)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        evaluation.ranks.say(f"warning: no examples for the report ({reason})", error=True)


def _submit(evaluation: Evaluation, outcome: Outcome) -> Path:
    task, config = evaluation.task, evaluation.subject.config
    rows = evaluation.passes[0].batches.dataset.rows()
    items = scorecard.samples_of(evaluation.corpora, rows)
    try:
        content = task.submission(config, outcome.predictions, items)
    except ValueError as error:
        scorecard.remove_submission(evaluation.folder)
        raise ConfigError(f"--submission: {error}") from error
    return scorecard.write_submission(evaluation.folder, content)


def refuse_submission(request: Request, task: Task, name: str) -> None:
    """Raise ConfigError, before anything is computed, where there can be no submission."""
    if not request.submission:
        return
    if not hasattr(task, "submission"):
        raise ConfigError(f"--submission: the task {name} has no official results file; leave it out")
    if request.samples is not None:
        raise ConfigError("--submission needs every item of the split; leave out --samples")


def _scorecard(evaluation: Evaluation, outcome: Outcome, seconds: float) -> dict[str, Any]:
    identity, subject, ranks = evaluation.identity, evaluation.subject, evaluation.ranks
    metrics, errors = scorecard.split_values(outcome.values)
    protocol = dict(identity["protocol"])
    environment = describe_environment(ranks.device)
    before = {} if evaluation.tests_before is None else {"evaluations_of_this_split_before": evaluation.tests_before}
    done = defaultdict(int)
    for records in evaluation.finished.values():
        done["items"] += sum(len(record.positions) for record in records)
    return {
        "task": identity["task"],
        "split": identity["split"],
        "corpora": list(dict.fromkeys(corpus.name for corpus in evaluation.corpora)),
        "metrics": metrics,
        "standard_errors": errors,
        "items": evaluation.num_items,
        "unusable": {"items": len(outcome.problems), "named": outcome.problems[: scorecard.SHOWN_PROBLEMS]},
        **before,
        "decoding": protocol.pop("decoding", None),
        "protocol": protocol,
        "options": identity["options"],
        **{name: identity[name] for name in ("samples", "batch_size", "seed", "max_text_length", "images")},
        "data": identity["corpora"],
        "data_fingerprint": _hash([identity[name] for name in ("corpora", "samples", "seed")]),
        "tokenizer": identity["tokenizer"],
        "checkpoint": {"path": str(subject.path), "step": subject.step, "sha256": subject.sha256},
        "seconds": round(seconds, 3),
        "items_done_before": done["items"],
        "world_size": ranks.place.world_size,
        "device": environment["device_name"],
        "versions": environment["versions"] | {name: environment[name] for name in ("python", "git_revision")},
        "command": shlex.join(sys.argv),
        "time": scorecard.now(),
    }
