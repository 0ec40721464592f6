"""Builds everything a run needs from its launch: device, engine, data, writers, and the state it continues from."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from data_prep.manifest import CAPTIONS
from model.census import Census, parameter_census
from pipeline.checkpoint import restore
from pipeline.checkpoint.changes import describe_changes, refuse_fewer_steps, schedule_settings
from pipeline.checkpoint.files import CheckpointError
from pipeline.checkpoint.fingerprint import accept, run_fingerprint
from pipeline.checkpoint.saver import Saver
from pipeline.checkpoint.state import RunState
from pipeline.cluster.heartbeats import Pulse
from pipeline.cluster.restarts import begin as begin_attempt
from pipeline.cluster.walltime import Walltime, end_time
from pipeline.config.command_line import Launch
from pipeline.config.options import Config, ConfigError, in_batch_negatives, to_plain
from pipeline.deepspeed_json.ds_config import Device, JsonProblems, read_ds_config, resolve
from pipeline.distributed.connecting import Ranks
from pipeline.distributed.endings import host_name
from pipeline.distributed.places import Place
from pipeline.distributed.run_lock import lock_run
from pipeline.engine.ds_check import check_ds_config
from pipeline.engine.engine import TrainEngine, build_device, prepare_deepspeed
from pipeline.incidents.guard import Guard
from pipeline.incidents.rewind import SkippedBatches, finish_setting_aside
from pipeline.loading.open_data import (
    TrainingBatches,
    TrainingData,
    data_fingerprint,
    first_images,
    open_training_data,
    sample_order,
)
from pipeline.loading.unusable import UnusableSamples
from pipeline.recording.run_log import MetricsWriter
from pipeline.recording.sample_keys import SampleKeys, cut_back_sample_keys
from pipeline.recording.trackers import check_trackers
from pipeline.staging.stager import Stager
from pipeline.staging.starting import start_staging
from pipeline.stored_features.opening import feature_source
from pipeline.tasks.task import EvaluationPass, EvaluationRanks, Score, Task, texts_of
from pipeline.training.run_files import copy_files, write_run_files
from pipeline.weights.starting import describe_start, fit_to_images, load_frozen, load_starting_weights


@dataclass
class Records:
    """What a run writes into its folder while it trains."""

    output: Path
    writer: MetricsWriter
    sample_keys: SampleKeys
    unusable: UnusableSamples
    saver: Saver


@dataclass
class Evaluation:
    """How a run is judged on held-out data; no passes where nothing is held out."""

    passes: list[EvaluationPass]
    scores: tuple[Score, ...]


@dataclass
class Session:
    """What the training loop works with."""

    config: Config
    ranks: Ranks
    engine: TrainEngine
    state: RunState
    guard: Guard | None
    batches: TrainingBatches
    evaluation: Evaluation
    records: Records
    stager: Stager | None  # on the one rank of a node that copies shards to its disk
    lock: int | None  # of the run folder, held while the process lives
    reason: str = ""  # why training ended, where that is not its last step
    pulse: Pulse = field(default_factory=Pulse)  # where it is, told to the other ranks


@dataclass
class Opened:
    """A run folder and its data before anything is built: what is asked for, and the checkpoint to go on from."""

    launch: Launch
    data: TrainingData
    fingerprint: dict[str, Any]
    saved: Path | None
    data_changes: dict[str, str]
    passed_by: list[int]
    lock: int | None


def resolve_ds_config(launch: Launch, place: Place, device: torch.device) -> dict[str, Any]:
    """The DeepSpeed JSON without any "auto"; raises ConfigError for every contradiction."""
    has_bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    given = read_ds_config(launch.deepspeed)
    try:
        resolved = resolve(given, launch.config, place.world_size, Device(device.type, has_bf16))
    except JsonProblems as wrong:
        check_ds_config(wrong.resolved, wrong.problems)  # raises with what DeepSpeed refuses besides
        raise
    check_ds_config(resolved)
    return resolved


def set_up(launch: Launch, ds_config: dict[str, Any], task: Task, ranks: Ranks) -> Session:
    """Open data, build the model and the engine, continue from the run's newest checkpoint if it has one.

    Raises:
        ValueError: anything a user can mend, in one line.
    """
    config, place, agreement = launch.config, ranks.place, ranks.agreement
    time_is_over = end_time(os.environ, time.time())
    check_trackers(config.tracking.wandb)
    of_task = task.fingerprint(config) if hasattr(task, "fingerprint") else {}
    opened = open_run(launch, task.num_images, ranks, of_task, texts_of(task))
    with build_device(ds_config, place):
        objective = task.build(config, opened.data.tokenizer.vocabulary)
    scores = task.scores(objective)
    refuse_unknown_score(config, scores)
    starting = None
    if opened.saved is None:
        starting = load_starting_weights(objective, config.model, opened.data.tokenizer, place, agreement)
    else:
        load_frozen(objective, config.model, place, agreement)
    features = feature_source(config, objective, agreement, [*opened.data.corpora, *opened.data.held_out])
    preparation = replace(task.preparation(config, objective, opened.data.tokenizer), features=features)
    if starting is not None:
        images = partial(first_images, config, opened.data, preparation)
        fit_to_images(objective, config.model, starting, images, place, agreement)
    lock = _lock(launch.output, ranks, opened.lock)  # of a new run only now: a mistake before this leaves no folder
    census = parameter_census(objective)
    prepare_deepspeed(ranks.device)
    engine = TrainEngine(objective, ds_config, config.optim, config.train, place, agreement)
    state, changes = continue_run(opened, engine, ranks)
    hosts = agreement.gather(host_name())
    if place.is_main:
        _announce(opened, state, census, engine, changes, starting)
        begin_attempt(launch.output, state.step, hosts, topology=state.topology)
        write_run_files(launch, ds_config, ranks, census.total, engine.precision, starting, scores)
        copy_files(getattr(task, "run_files", {}), config, launch.output)
        cut_back_sample_keys(launch.output, state.step)
    records = open_records(opened, engine, state, ranks)
    if place.is_main and time_is_over is not None:
        ranks.stop.time_is_up = Walltime(time_is_over, records.saver.expected_seconds).is_up
    order = sample_order(config, opened.data)
    stager = start_staging(config, opened.data.corpora, order, ranks, engine.accumulation, state.step)
    pin = ranks.device.type == "cuda"
    held_out = opened.data.held_out
    evaluating = EvaluationRanks(place, pin, lambda done: agreement.total([not done])[0] == 0, in_training=True)
    passes = task.passes(config, objective, preparation, held_out, evaluating) if held_out else []
    return Session(
        config=config,
        ranks=ranks,
        engine=engine,
        state=state,
        guard=Guard(config.guard, state.guard) if config.guard.enabled else None,
        batches=TrainingBatches(config, opened.data, preparation, place, engine.accumulation, pin),
        evaluation=Evaluation(passes, scores),
        records=records,
        stager=stager,
        lock=lock,
    )


def open_run(
    launch: Launch,
    num_images: int,
    ranks: Ranks,
    of_task: Mapping[str, Any] = MappingProxyType({}),
    texts: str = CAPTIONS,
) -> Opened:
    """Open the data and find the checkpoint to go on from; every rank must call it.

    ``of_task``: what of the task's own files decides what a step computes, by name; ``texts``: what its texts are.

    Raises:
        ValueError: data that is missing, a run of other settings, one that another process holds, one that is done.
    """
    config, output, is_main = launch.config, launch.output, ranks.place.is_main
    data = open_training_data(config, num_images, ranks.agreement, texts)
    settle_length(config, data)
    lock = _lock(output, ranks) if ranks.agreement.gather(output.is_dir())[0] else None
    torch.manual_seed(config.train.seed)
    wanted, data_changes = run_fingerprint(config, data_fingerprint(config, data) | of_task), {}
    passed_by = SkippedBatches.read(output).steps  # on every rank, so that a damaged file ends all alike
    for name in finish_setting_aside(output) if is_main else ():
        ranks.say(f"guard: finished a rewind that was cut off: set aside {name}", error=True)
    saved = restore.find(output, ranks.agreement, is_main)
    if saved is not None:
        before = restore.read_state(saved)
        data_changes = accept(output, before.fingerprint, wanted, config)
        refuse_fewer_steps(output, before.step, config.train)
    return Opened(launch, data, wanted, saved, data_changes, passed_by, lock)


def settle_length(config: Config, data: TrainingData) -> None:
    """Set ``train.steps`` to what ``train.epochs`` means for the samples that were found.

    Raises:
        ConfigError: ``train.patience`` waits for evaluations, and nothing is held out.
    """
    train, samples = config.train, sum(data.sizes)
    if train.epochs is not None:
        train.steps = math.ceil(Fraction(str(train.epochs)) * samples / config.optim.batch_size)
    if train.patience and not data.held_out:
        raise ConfigError(
            f"train.patience {train.patience} counts evaluations, and there is no split {config.data.eval_split!r} "
            f"(data.eval_split) in {', '.join(config.data.paths)}; prepare one, or use --train.patience 0"
        )


def continue_run(opened: Opened, engine: TrainEngine, ranks: Ranks) -> tuple[RunState, list[str]]:
    """The state that the run goes on from, the engine set to it; and what differs from the part before, in words."""
    config = opened.launch.config
    state = restore.load(opened.saved, engine, ranks.agreement) if opened.saved else RunState()
    _refuse_other_position(config, state)
    state.fingerprint = opened.fingerprint
    state.data_changes += [{"after_step": state.step, **opened.data_changes}] if opened.data_changes else []
    changes = _take_note_of_changes(state, config, ranks.place, engine)
    changes += [f"another {name}: {change}" for name, change in opened.data_changes.items()]
    state.passed_by = sorted({*state.passed_by, *opened.passed_by})
    return state, changes


def open_records(opened: Opened, engine: TrainEngine, state: RunState, ranks: Ranks) -> Records:
    """What the run writes, cut back to ``state``; every rank must call it."""
    config, output, place = opened.launch.config, opened.launch.output, ranks.place
    unusable = UnusableSamples(output, config.data, ranks.agreement, place.is_main)
    unusable.return_to(state.step, state.unusable, state.unusable_shards)
    ranks.agreement.wait()
    tracking = config.tracking
    writer = MetricsWriter(output, to_plain(config), place.is_main, tracking.tensorboard, tracking.wandb)
    saved_step = state.step if opened.saved else None
    writer.resume_from(-1 if saved_step is None else saved_step)
    if opened.data_changes:
        writer.log(state.step, opened.data_changes, kind="data_change")
    saver = Saver(output, engine, config.train, place, ranks.agreement, saved_step, writer.log)
    saver.durations.extend(one["seconds"] for one in writer.records("checkpoint"))
    state.best = saver.best_of(state)
    return Records(output, writer, SampleKeys(output, place.rank, tracking.sample_keys), unusable, saver)


def refuse_unknown_score(config: Config, scores: Sequence[Score]) -> None:
    """Raise ConfigError for a train.keep_best that no evaluation of the task gives."""
    names = [score.name for score in scores]
    if config.train.keep_best is not None and config.train.keep_best not in names:
        raise ConfigError(
            f"train.keep_best: found {config.train.keep_best!r}, expected one of {', '.join(names)}, or null"
        )


def _lock(output: Path, ranks: Ranks, held: int | None = None) -> int | None:
    """Rank 0 holds the lock of the run folder; every rank raises when it cannot have it."""
    error = None
    if ranks.place.is_main and held is None:
        try:
            held = lock_run(output)
        except ValueError as refused:
            error = str(refused)
    error = ranks.agreement.gather(error)[0]
    if error is not None:
        raise ConfigError(error)
    return held


def _take_note_of_changes(state: RunState, config: Config, place: Place, engine: TrainEngine) -> list[str]:
    """Write topology and settings of this part of the run into its state; what differs from the part before, said."""
    topology = {
        "world_size": place.world_size,
        "zero_stage": engine.stage,
        "precision": engine.precision,
        "micro_batch_size": config.optim.micro_batch_size,
    }
    settings = schedule_settings(config)
    changes = describe_changes(state.topology, topology, state.settings, settings)
    state.topology, state.settings = topology, settings
    return changes


def _refuse_other_position(config: Config, state: RunState) -> None:
    """Raise CheckpointError when the position in the sample order is not the one that the steps lead to."""
    expected = state.step * config.optim.batch_size
    if state.samples_seen != expected:
        raise CheckpointError(
            f"the checkpoint of step {state.step} says {state.samples_seen} samples were seen, expected {expected} "
            f"({config.optim.batch_size} per step); remove it, an older one is used then"
        )


def _announce(
    opened: Opened,
    state: RunState,
    census: Census,
    engine: TrainEngine,
    changes: list[str],
    starting: dict[str, Any] | None,
) -> None:
    config, data = opened.launch.config, opened.data
    if starting is not None:
        line, warnings = describe_start(starting)
        print(line, flush=True)
        for warning in warnings:
            print(warning, file=sys.stderr, flush=True)
    sizes = ", ".join(f"{corpus.name} {size}" for corpus, size in zip(data.corpora, data.sizes, strict=True))
    held_out = sum(len(corpus) for corpus in data.held_out)
    print(f"model: {census.line()}; {engine.precision}, ZeRO {engine.stage}, {engine.device}")
    print(f"data: {sizes} training samples, {held_out} held out")
    if config.train.epochs is not None:
        samples = sum(data.sizes)
        batches = f"batches of {config.optim.batch_size}"
        print(f"length: {config.train.epochs:g} epochs of {samples} samples in {batches}, {config.train.steps} steps")
    if in_batch_negatives(config) is not None:
        size = config.optim.micro_batch_size
        print(f"negatives: out of {size} captions, those of a micro-batch; with another micro-batch it is another run")
    if state.step:
        print(f"continuing after step {state.step} of {config.train.steps}", flush=True)
        for change in changes:
            print(f"continuing with {change}", flush=True)
