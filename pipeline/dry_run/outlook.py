"""All that can be said of a run before it starts, as plain values."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from model.census import parameter_census
from pipeline.config.command_line import Launch
from pipeline.config.options import Config, flatten
from pipeline.deepspeed_json.ds_config import read_ds_config
from pipeline.distributed.places import Place
from pipeline.dry_run.counting import known_vocabulary
from pipeline.dry_run.data_found import describe_data, find_data, mean_tokens
from pipeline.dry_run.device_found import FoundDevice, find_device
from pipeline.dry_run.duration import Measured, as_measured, at_rate
from pipeline.dry_run.run_folder import describe_checkpoints, describe_folder
from pipeline.dry_run.stages import Counts, Stage, stages_of
from pipeline.finetuning.table import task_of
from pipeline.loading.open_data import TrainingData
from pipeline.planning.counts import TEXT_TOKENS
from pipeline.planning.summary import parts_of
from pipeline.tasks.task import Task
from pipeline.training.session import refuse_unknown_score, resolve_ds_config, settle_length


class Outlook:
    """A run seen from before its start. ``problems`` are the reasons why training would refuse it.

    What one part lacks, data or a tokenizer, is a problem, and the other parts are still there.
    """

    def __init__(self, launch: Launch, place: Place) -> None:
        self.launch = launch
        self.config: Config = copy.deepcopy(launch.config)  # epochs become steps
        self.ranks = place.world_size
        self.device: FoundDevice = find_device(place)
        self.problems: list[str] = []
        task = task_of(self.config)
        data, reasons = find_data(self.config, task)
        self.problems += reasons
        self.data = describe_data(self.config, task, data)
        if data is not None:
            self._settle(data)
        self.samples = None if data is None else sum(data.sizes)
        self.held_out = 0 if data is None else sum(len(corpus) for corpus in data.held_out)
        self.text_tokens = TEXT_TOKENS if data is None else mean_tokens(data, self.config.data.max_text_length)
        self.folder, reasons = describe_folder(self._settled_launch(), task, data)
        self.problems += reasons
        self.parameters: dict[str, Any] | None = None
        self.stages: list[Stage] = []
        self.operations: float | None = None
        self._count(task, place)
        trained = None if self.parameters is None else self.parameters["trained"]
        self.checkpoints = describe_checkpoints(launch.output, trained, self.config.train, self.folder["step"])
        self.problems += _no_room(self.checkpoints)

    @property
    def steps_known(self) -> bool:
        return self.config.train.epochs is None or self.samples is not None

    @property
    def chosen(self) -> Stage | None:
        """The stage that the run is set up with."""
        return next((one for one in self.stages if one.stage == self.set_up_stage), None)

    def _settled_launch(self) -> Launch:
        return dataclasses.replace(self.launch, config=self.config)

    def _settle(self, data: TrainingData) -> None:
        try:
            settle_length(self.config, data)
        except ValueError as error:
            self.problems.append(str(error))

    def _count(self, task: Task, place: Place) -> None:
        """Parameters, bytes by stage and operations, or the reasons why they are not known."""
        self.vocabulary, self.set_up_stage = "", None
        given: Mapping[str, Any] = {}
        try:
            given = read_ds_config(self.launch.deepspeed)
            resolved = resolve_ds_config(self.launch, place, self.device.torch_device)
            self.set_up_stage = resolved["zero_optimization"]["stage"]
        except ValueError as error:
            self.problems.append(str(error))
        try:
            vocabulary, self.vocabulary = known_vocabulary(self.config)
            counts = Counts(self.config, vocabulary, self.device, self.text_tokens)
        except ValueError as error:
            self.problems += [] if str(error) in self.problems else [str(error)]
            return
        objective = counts.objective("fp32")
        self.parameters = _parameters(objective)
        try:
            refuse_unknown_score(self.config, task.scores(objective))
        except ValueError as error:
            self.problems.append(str(error))
        if self.set_up_stage is not None:
            self.stages = stages_of(counts, given, self.config, self.ranks, self.device)
            work = counts.work(self.chosen.precision)
            self.operations = work.flops / work.samples

    def time(self, measured: Measured | None, samples_per_second: float | None) -> dict[str, Any] | None:
        """Seconds of the run by part: as measured, at the throughput given, or by the planner's model of a GPU; None
        where none of them is there, or the steps are not known."""
        if not self.steps_known:
            return None
        first_step = self.folder["step"]
        if measured is not None:
            return as_measured(self.config, first_step, self.held_out, measured)
        if samples_per_second is not None:
            return at_rate(self.config, first_step, self.held_out, samples_per_second, "given")
        if self.chosen is not None and self.chosen.speed is not None:
            rate = self.chosen.speed.samples_per_second
            return at_rate(self.config, first_step, self.held_out, rate, "model")
        return None

    def as_plain(self, time: Mapping[str, Any] | None) -> dict[str, Any]:
        """Numbers and strings for JSON, in bytes, seconds and floating-point operations."""
        launch, train, device = self.launch, self.config.train, self.device
        settings = {name: {"value": value, "source": launch.sources.get(name, "default")}
                    for name, value in flatten(self.config)}  # fmt: skip
        return {
            "recipe": launch.recipe,
            "deepspeed": str(launch.deepspeed),
            "ranks": self.ranks,
            "settings": settings,
            "settings_not_used": dict(launch.idle),
            "device": {"kind": device.kind, "name": device.name, "memory_bytes_of_a_rank": device.memory_bytes},
            "vocabulary": self.vocabulary,
            "parameters": self.parameters,
            "memory": [_plain(one, one.stage == self.set_up_stage) for one in self.stages],
            "operations_per_sample": self.operations,
            "data": self.data,
            "steps": train.steps if self.steps_known else None,
            "samples": train.steps * self.config.optim.batch_size if self.steps_known else None,
            "epochs": self.epochs,
            "tokens": self.tokens,
            "tokens_of_a_text": self.text_tokens,
            "run_folder": self.folder,
            "checkpoints": self.checkpoints,
            "time": time,
            "problems": self.problems,
        }

    @property
    def epochs(self) -> float | None:
        """Passes over the training samples, None where these are not known."""
        if not self.samples:
            return None
        return self.config.train.steps * self.config.optim.batch_size / self.samples

    @property
    def tokens(self) -> int | None:
        """Text tokens of the whole run, both ends of a text counted, by the average of the texts that were read."""
        if not self.steps_known:
            return None
        texts = self.config.train.steps * self.config.optim.batch_size * self.config.data.texts_per_image
        return round(texts * self.text_tokens)


def _parameters(objective: nn.Module) -> dict[str, Any]:
    census = parameter_census(objective)
    trained = census.trained
    parts = {name: {"parameters": number, "trained": trained[name]} for name, number in census.parameters.items()}
    return {"all": census.total, "trained": sum(trained.values()), "parts": parts, "table": census.table()}


def _no_room(checkpoints: Mapping[str, Any]) -> list[str]:
    """The problem of a disk that is too small for what a run keeps."""
    needed, free = checkpoints.get("most_bytes"), checkpoints["free_bytes"]
    if needed is None or needed <= free:
        return []
    return [
        f"checkpoints need {needed / 1e9:.1f} GB at a time, {free / 1e9:.1f} GB are free there; use another --output,"
        " or keep fewer (train.keep_last, train.keep_every)"
    ]


def _plain(one: Stage, is_set_up: bool) -> dict[str, Any]:
    if one.memory is None:
        return {"zero_stage": one.stage, "set_up": is_set_up, "refused": one.refused}
    return {
        "zero_stage": one.stage,
        "set_up": is_set_up,
        "precision": one.precision,
        "accumulation": one.accumulation,
        "bytes_of_a_rank": one.memory.peak,
        "moment": one.memory.moment,
        "by_part": parts_of(one.memory),
        "host_by_part": dict(one.memory.host),
        "fits": one.fits,
    }
