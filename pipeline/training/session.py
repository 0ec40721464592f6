"""Builds everything a run needs from its launch: device, engine, data, writers, and the state it continues from."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.batch import Batch, Planner
from model.build import build_objective
from pipeline.checkpoint import fingerprint, restore
from pipeline.checkpoint.changes import describe_changes, refuse_fewer_steps, schedule_settings
from pipeline.checkpoint.files import CheckpointError
from pipeline.checkpoint.run_lock import lock_run
from pipeline.checkpoint.saver import Saver
from pipeline.checkpoint.state import RunState
from pipeline.config.command_line import Launch
from pipeline.config.ds_config import Device, read_ds_config, resolve
from pipeline.config.options import Config, ConfigError, save_config, to_plain, tokenizer_source
from pipeline.distributed.preempt import StopRequest
from pipeline.distributed.ranks import Agreement, Place
from pipeline.engine.engine import TrainEngine, prepare_deepspeed
from pipeline.incidents.guard import Guard
from pipeline.incidents.rewind import PassedBy, finish_setting_aside
from pipeline.loading.loader import BatchLoader
from pipeline.loading.open_data import (
    TrainingData,
    data_fingerprint,
    eval_loader,
    open_training_data,
    placeholder_batch,
    train_loader,
)
from pipeline.loading.unusable import UnusableSamples
from pipeline.reporting.environment import describe_environment
from pipeline.reporting.metrics import MetricsWriter
from pipeline.reporting.sample_keys import SampleKeys, cut_back_sample_keys
from pipeline.weights.starting import describe_start, load_starting_weights


@dataclass
class Session:
    """What the training loop works with."""

    config: Config
    output: Path
    place: Place
    agreement: Agreement
    stop: StopRequest
    engine: TrainEngine
    state: RunState
    guard: Guard | None
    batches: Any  # BatchLoader of this rank's micro-batches from state.step on
    batches_from: Callable[[int, list[int]], Any]  # another one: from a step on, around the steps passed by
    eval_loaders: tuple[Any, Any] | None  # own images, shuffled images
    placeholder: Batch
    writer: MetricsWriter
    sample_keys: SampleKeys
    unusable: UnusableSamples
    flops: Callable[[Batch], float]
    saver: Saver
    lock: int | None  # held while the process lives


def choose_device(place: Place) -> tuple[Place, torch.device]:
    """This rank's GPU, or the CPU where there is none; the place with the number of that GPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        return place, torch.device("cpu")
    local_rank = 0 if count == 1 and place.launcher == "slurm" else place.local_rank  # Slurm may show each task its own
    if local_rank >= count:
        raise ConfigError(f"local rank {local_rank} has no GPU, {count} visible; start at most {count} ranks per node")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return dataclasses.replace(place, local_rank=local_rank), device


def resolve_ds_config(launch: Launch, place: Place, device: torch.device) -> dict[str, Any]:
    """The DeepSpeed JSON without any "auto"; raises ConfigError for every contradiction."""
    has_bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    given = read_ds_config(launch.deepspeed)
    return resolve(given, launch.config, place.world_size, Device(device.type, has_bf16))


def set_up(
    launch: Launch, ds_config: dict[str, Any], place: Place, device: torch.device, agreement: Agreement
) -> Session:
    """Open data, build the model and the engine, continue from the run's newest checkpoint if it has one.

    Raises:
        ValueError: anything a user can mend, in one line.
    """
    config, output = launch.config, launch.output
    data = open_training_data(config)
    lock = _lock(output, place, agreement) if agreement.gather(output.is_dir())[0] else None
    torch.manual_seed(config.train.seed)
    length = config.data.max_text_length
    wanted, data_changes = fingerprint.run_fingerprint(config, data_fingerprint(config, data)), {}
    passed_by = PassedBy.read(output).steps  # on every rank, so that a damaged file ends all alike
    for name in finish_setting_aside(output) if place.is_main else ():
        print(f"guard: finished a rewind that was cut off: set aside {name}", file=sys.stderr, flush=True)
    saved = restore.find(output, agreement, place.is_main)
    if saved is not None:
        before = restore.read_state(saved)
        data_changes = fingerprint.accept(output, before.fingerprint, wanted, config.data.allow_change)
        refuse_fewer_steps(output, before.step, config.train.steps)
    objective = build_objective(config.model, config.objective, data.tokenizer.vocabulary, length, pretrained=False)
    _refuse_unknown_metric(config, objective.term_weights)
    starting = None
    if saved is None:
        starting = load_starting_weights(objective, config.model, data.tokenizer, place, agreement)
    num_parameters = sum(parameter.numel() for parameter in objective.parameters())
    planner = objective.planner
    lock = _lock(output, place, agreement, lock)  # of a new run only now: a mistake before this leaves no folder
    prepare_deepspeed(device)
    engine = TrainEngine(objective, ds_config, config.optim, config.train, place, agreement)
    state = restore.load(saved, engine) if saved else RunState()
    _refuse_other_position(config, state)
    state.fingerprint = wanted
    state.data_changes += [{"after_step": state.step, **data_changes}] if data_changes else []
    changes = _take_note_of_changes(state, config, place, engine)
    changes += [f"another {name}: {change}" for name, change in data_changes.items()]
    if place.is_main:
        _announce(config, data, state, num_parameters, engine, changes, starting)
        _write_run_files(launch, ds_config, device, place, num_parameters, engine.precision, starting)
        cut_back_sample_keys(output, state.step)
    unusable = UnusableSamples(output, config.data, agreement, place.is_main)
    unusable.return_to(state.step, state.unusable, state.unusable_shards)
    agreement.wait()
    tracking = config.tracking
    writer = MetricsWriter(output, to_plain(config), place.is_main, tracking.tensorboard, tracking.wandb)
    writer.resume_from(state.step if saved else -1)
    if data_changes:
        writer.log(state.step, data_changes, kind="data_change")
    saver = Saver(output, engine, config.train, place, agreement, state.step if saved else None, writer.log)
    state.best = saver.best_of(state)
    state.passed_by = sorted({*state.passed_by, *passed_by})
    pin = device.type == "cuda"
    batches_from = lambda step, passed_by: train_loader(  # noqa: E731
        config, data, planner, place, engine.accumulation, step, pin, passed_by
    )
    return Session(
        config=config,
        output=output,
        place=place,
        agreement=agreement,
        stop=StopRequest().listen(),
        engine=engine,
        state=state,
        guard=Guard(config.guard, state.guard) if config.guard.enabled else None,
        batches=batches_from(state.step, state.passed_by),
        batches_from=batches_from,
        eval_loaders=_eval_loaders(config, data, planner, place, pin),
        placeholder=placeholder_batch(config, data.tokenizer, planner),
        writer=writer,
        sample_keys=SampleKeys(output, place.rank, tracking.sample_keys),
        unusable=unusable,
        flops=objective.flops,
        lock=lock,
        saver=saver,
    )


def _eval_loaders(
    config: Config, data: TrainingData, planner: Planner, place: Place, pin: bool
) -> tuple[BatchLoader, BatchLoader] | None:
    """Held-out samples with their own images and with shuffled ones; None where nothing is held out."""
    if not data.held_out:
        return None
    own, shuffled = (
        eval_loader(config, data.held_out, data.tokenizer, planner, place, pin, shuffle) for shuffle in (False, True)
    )
    return own, shuffled


def _lock(output: Path, place: Place, agreement: Agreement, held: int | None = None) -> int | None:
    """Rank 0 holds the lock of the run folder; every rank raises when it cannot have it."""
    error = None
    if place.is_main and held is None:
        try:
            held = lock_run(output)
        except ValueError as refused:
            error = str(refused)
    error = agreement.gather(error)[0]
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


def _refuse_unknown_metric(config: Config, terms: Iterable[str]) -> None:
    """Raise ConfigError for a train.keep_best that no evaluation gives."""
    metrics = ["loss", *(f"{term}_{kind}" for term in terms for kind in ("loss", "accuracy"))]
    if config.train.keep_best is not None and config.train.keep_best not in metrics:
        raise ConfigError(
            f"train.keep_best: found {config.train.keep_best!r}, expected one of {', '.join(metrics)}, or null"
        )


def _refuse_other_position(config: Config, state: RunState) -> None:
    """Raise CheckpointError when the position in the sample order is not the one that the steps lead to."""
    expected = state.step * config.optim.batch_size
    if state.samples_seen != expected:
        raise CheckpointError(
            f"the checkpoint of step {state.step} says {state.samples_seen} samples were seen, expected {expected} "
            f"({config.optim.batch_size} per step); remove it, an older one is used then"
        )


def _announce(
    config: Config,
    data: TrainingData,
    state: RunState,
    num_parameters: int,
    engine: TrainEngine,
    changes: list[str],
    starting: dict[str, Any] | None,
) -> None:
    if starting is not None:
        line, warnings = describe_start(starting)
        print(line, flush=True)
        for warning in warnings:
            print(warning, file=sys.stderr, flush=True)
    sizes = ", ".join(f"{corpus.name} {len(corpus)}" for corpus in data.corpora)
    held_out = sum(len(corpus) for corpus in data.held_out)
    print(f"model: {num_parameters / 1e6:.1f} M parameters, {engine.precision}, ZeRO {engine.stage}, {engine.device}")
    print(f"data: {sizes} training pairs, {held_out} held out")
    if config.objective.negatives == "in_batch_hard":
        size = config.optim.micro_batch_size
        print(f"negatives: out of {size} captions, those of a micro-batch; with another micro-batch it is another run")
    if state.step:
        print(f"continuing after step {state.step} of {config.train.steps}", flush=True)
        for change in changes:
            print(f"continuing with {change}", flush=True)


def _write_run_files(
    launch: Launch,
    ds_config: dict[str, Any],
    device: torch.device,
    place: Place,
    num_parameters: int,
    precision: str,
    starting: dict[str, Any] | None,
) -> None:
    output = launch.output
    output.mkdir(parents=True, exist_ok=True)
    save_config(launch.config, output / "config.yaml")
    (output / "ds_config.json").write_text(json.dumps(ds_config, indent=2) + "\n", encoding="utf-8")
    environment = {
        "recipe": launch.recipe,
        "world_size": place.world_size,
        "launcher": place.launcher,
        "precision": precision,
        "num_parameters": num_parameters,
        "starting_weights": starting or _recorded_start(output / "environment.json"),
        "sources": launch.sources,
        **describe_environment(device),
    }
    (output / "environment.json").write_text(json.dumps(environment, indent=2) + "\n", encoding="utf-8")
    copy_tokenizer(tokenizer_source(launch.config.data), output)


def _recorded_start(environment: Path) -> dict[str, Any] | None:
    """What the first part of a run noted of its starting weights; None where nothing is to be read."""
    try:
        return json.loads(environment.read_text(encoding="utf-8")).get("starting_weights")
    except (OSError, ValueError, AttributeError):
        return None


def copy_tokenizer(source: str | Path, output: Path) -> None:
    """RUN/tokenizer, whole or not there: a run that is killed while it copies does it again."""
    final, beside = output / "tokenizer", output / "tokenizer.tmp"
    if Path(source).is_dir() and not final.exists():
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(source, beside)
        os.rename(beside, final)
