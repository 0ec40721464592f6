"""Repeats a bad step in one process and compares it with its record (the program: pipeline/replay.py)."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.batch import Batch
from pipeline.checkpoint.files import defect
from pipeline.config.command_line import config_of, load_config
from pipeline.config.options import Config, flatten, in_batch_negatives
from pipeline.distributed.places import Place
from pipeline.incidents.module_statistics import module_statistics
from pipeline.incidents.records import IncidentError, read_incident
from pipeline.loading.open_data import TrainingBatches, TrainingData, open_training_data
from pipeline.tasks.task import Task, texts_of
from pipeline.weights.starting import load_trained

EXIT_REPRODUCED, EXIT_DIFFERENT = 0, 1
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}  # relative, of a loss; gradient norms get ten times that
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Slot:
    """One micro-batch replayed beside its record."""

    row: Mapping[str, Any]  # of incident.json
    loss: float  # weighted mean over its own targets
    recorded: float
    sums: dict[str, float]
    keys: list[str]
    broken: str | None  # first module whose output is not finite


@dataclass
class Replay:
    """All that is needed to run the step again."""

    incident: dict[str, Any]
    config: Config
    data: TrainingData
    task: Task
    objective: nn.Module
    device: torch.device
    slots: list[Slot] = field(default_factory=list)

    @property
    def precision(self) -> str:
        return self.incident["topology"]["precision"]


def load_replay(
    path: Path,
    device: torch.device,
    task_of: Callable[[Config], Task],
    data_paths: Sequence[str] | None = None,
) -> Replay:
    """Read the incident and open everything that it names.

    Raises:
        ValueError: what is missing or damaged, in one line.
    """
    incident = read_incident(path)
    run = (path if path.is_dir() else path.parent).resolve().parent.parent
    weights_of = _checkpoint_of(incident, run)
    config = config_of(incident["config"], path)
    _say_what_changed(config, run)
    if (run / "tokenizer").is_dir():
        config.data.tokenizer = str(run / "tokenizer")
    config.data.paths = list(data_paths or config.data.paths)
    config.data.eval_split, config.data.num_workers = None, 0
    config.train.steps, task = incident["step"] + 1, task_of(config)
    data = open_training_data(config, task.num_images, texts=texts_of(task))
    objective = task.build(config, data.tokenizer.vocabulary)
    load_trained(objective, config.model, weights_of)
    dtype = DTYPES[incident["topology"]["precision"]]
    objective = objective.to(device=device, dtype=dtype).train()
    return Replay(incident, config, data, task, objective, device)


def run_step(replay: Replay) -> None:
    """Forward and backward over every micro-batch of every rank, in the order of the samples."""
    counts = replay.incident["counts"]
    with _FirstBroken(replay.objective) as broken:
        for row, batch in zip(replay.incident["micro_batches"], _micro_batches(replay), strict=True):
            broken.module = None
            torch.manual_seed(row["dropout_seed"])
            sums = replay.objective(batch.to(replay.device))
            weights = replay.objective.term_weights
            loss = sum(weights[name] / max(counts.get(name, 0), 1) * value for name, value in sums.items())
            if isinstance(loss, Tensor) and loss.requires_grad:
                loss.backward()
            found = {name: float(value.detach()) for name, value in sums.items()}
            mean, recorded = (_mean_loss(one, batch, weights) for one in (found, row["losses"]))
            replay.slots.append(Slot(row, mean, recorded, found, list(batch.keys), broken.module))


def _micro_batches(replay: Replay) -> Iterator[Batch]:
    """The step's micro-batches of all ranks, by slot, one in memory at a time."""
    topology, step = replay.incident["topology"], replay.incident["step"]
    world, accumulation = topology["world_size"], topology["accumulation"]
    ranks = [
        _batches(replay, Place(rank, world, rank, "single"), topology["micro_batch_size"], accumulation, step)
        for rank in range(world)
    ]
    for _ in range(accumulation):
        for batches in ranks:
            yield next(batches)


def _batches(replay: Replay, place: Place, micro_batch_size: int, accumulation: int, step: int) -> Iterator[Batch]:
    optim = dataclasses.replace(replay.config.optim, micro_batch_size=micro_batch_size)
    config = dataclasses.replace(replay.config, optim=optim)
    preparation = replay.task.preparation(config, replay.objective, replay.data.tokenizer)
    return TrainingBatches(config, replay.data, preparation, place, accumulation, pin=False).start(step)


class _FirstBroken:
    """Notes the first module, in the order of execution, whose output is not finite; inner modules come first."""

    def __init__(self, objective: nn.Module) -> None:
        self.module: str | None = None
        self._objective = objective
        self._handles: list[Any] = []

    def __enter__(self) -> _FirstBroken:
        for name, module in self._objective.named_modules():
            hook = lambda _module, _inputs, output, name=name: self._look(name, output)  # noqa: E731
            self._handles.append(module.register_forward_hook(hook))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _look(self, name: str, output: Any) -> None:
        if self.module is None and not all(bool(torch.isfinite(one).all()) for one in _floats(output)):
            self.module = name or "the objective"


def _floats(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        yield from (one for item in value.values() for one in _floats(item))
    elif isinstance(value, (list, tuple)):
        yield from (one for item in value for one in _floats(item))
    elif dataclasses.is_dataclass(value):
        yield from _floats([getattr(value, item.name) for item in dataclasses.fields(value)])


def run_sample(replay: Replay, key: str) -> int:
    """Run one sample of the step alone and print its losses."""
    incident = replay.incident
    size, step = incident["topology"]["micro_batch_size"], incident["step"]
    places = {one: row["slot"] * size + at for row in incident["micro_batches"] for at, one in enumerate(row["keys"])}
    if key not in places:
        raise IncidentError(f"--sample {key}: no such sample in this step; its keys stand in incident.json")
    total = size * len(incident["micro_batches"])
    batch = next(_batches(replay, Place(places[key], total, 0, "single"), 1, 1, step))
    torch.manual_seed(0)
    with _FirstBroken(replay.objective) as broken:
        sums = replay.objective(batch.to(replay.device))
    sum(replay.objective.term_weights[name] * value for name, value in sums.items()).backward()
    without = ", without a negative" if in_batch_negatives(replay.config) is not None else ""
    print(f"sample {batch.keys[0]} alone{without}, other dropout than in its batch:")
    for name, value in sums.items():
        print(f"  {name}: {float(value.detach()) / max(batch.counts.get(name, 0), 1):.6g} a target")
    print(f"  first module whose output is not finite: {broken.module or 'none'}")
    _print_modules(replay)
    return EXIT_REPRODUCED


def print_comparison(replay: Replay) -> int:
    """Print what was found, the worst first; the exit code says whether it is the record's."""
    incident, topology = replay.incident, replay.incident["topology"]
    print(f"step {incident['step']}: {incident['reason']}")
    print(
        f"weights {incident['checkpoint']}; {topology['world_size']} ranks x {topology['accumulation']} micro-batches "
        f"of {topology['micro_batch_size']}, ZeRO {topology['zero_stage']}, {replay.precision}"
    )
    print("micro-batches, the worst first:")
    for slot in sorted(replay.slots, key=lambda one: (math.isfinite(one.loss), -one.loss)):
        where = f"slot {slot.row['slot']} (rank {slot.row['rank']}, micro-batch {slot.row['micro_batch']})"
        print(f"  {where}: loss {slot.loss:.6g}, recorded {slot.recorded:.6g}; {' '.join(slot.keys)}")
    norm = _print_modules(replay)
    broken = next((slot for slot in replay.slots if slot.broken), None)
    where = f"{broken.broken}, in slot {broken.row['slot']}" if broken else "none"
    print(f"first module whose output is not finite: {where}")
    return _compare(replay, norm)


def _compare(replay: Replay, norm: float) -> int:
    recorded, tolerance = replay.incident["grad_norm"], TOLERANCE[replay.precision]
    other = next((slot for slot in replay.slots if slot.keys != list(slot.row["keys"])), None)
    if other is not None:
        print(f"NOT reproduced: slot {other.row['slot']} holds other samples; is this the data that the run read?")
        return EXIT_DIFFERENT
    pairs = [(slot.sums.get(name), value) for slot in replay.slots for name, value in slot.row["losses"].items()]
    exact = all(_equal(found, value, 0.0) for found, value in pairs)
    close = all(_equal(found, value, tolerance) for found, value in pairs)
    norm_close = recorded is None or _equal(norm, recorded, 10 * tolerance)
    print(f"losses: {'bit-equal to' if exact else f'within {tolerance:g} of' if close else 'other than'} the record")
    print(f"gradient norm: {norm:.6g}, recorded {recorded if recorded is None else format(recorded, '.6g')}")
    if close and norm_close:
        print("reproduced")
        return EXIT_REPRODUCED
    print("NOT reproduced: the cause may lie in the machine that ran it (compare device and torch in incident.json)")
    return EXIT_DIFFERENT


def _print_modules(replay: Replay) -> float:
    """The table of modules; returns the gradient norm of the whole step, not finite where an element is not."""
    named = ((n, p.grad, p) for n, p in replay.objective.named_parameters() if p.requires_grad)
    found, recorded = module_statistics(named), replay.incident.get("modules", {})
    width = max(len(name) for name in found)
    print(f"{'module':<{width}}  {'grad norm':>11} {'recorded':>11} {'bad grads':>9} {'weights':>11} {'bad':>5}")
    for name, row in sorted(found.items(), key=lambda item: (-item[1]["bad_gradients"], -item[1]["grad_norm"])):
        was = recorded.get(name, {}).get("grad_norm", math.nan)
        print(
            f"{name:<{width}}  {row['grad_norm']:>11.5g} {was:>11.5g} {row['bad_gradients']:>9} "
            f"{row['weight_norm']:>11.5g} {row['bad_weights']:>5}"
        )
    if any(row["bad_gradients"] for row in found.values()):
        return math.inf
    return math.sqrt(sum(row["grad_norm"] ** 2 for row in found.values()))


def _mean_loss(sums: Mapping[str, float], batch: Batch, weights: Mapping[str, float]) -> float:
    return sum(weights[name] * value / max(batch.counts.get(name, 0), 1) for name, value in sums.items())


def _equal(found: float | None, recorded: float, tolerance: float) -> bool:
    """Equal within a relative tolerance; numbers that are not finite are all the same."""
    if found is None or not math.isfinite(found) or not math.isfinite(recorded):
        return found is not None and not math.isfinite(found) and not math.isfinite(recorded)
    return abs(found - recorded) <= tolerance * max(abs(recorded), 1e-6)


def _checkpoint_of(incident: Mapping[str, Any], run: Path) -> Path:
    name = incident["checkpoint"]
    if name is None:
        raise IncidentError(
            "this incident has no checkpoint of the weights before its step, so it cannot be replayed; "
            "--guard.save_incident_every 1 makes one for each"
        )
    path = run / "checkpoints" / name
    if not path.resolve().is_relative_to((run / "checkpoints").resolve()):
        raise IncidentError(f"incident.json names the checkpoint {name!r}, expected step_N; the incident is damaged")
    reason = defect(path) if path.is_dir() else "no such folder; it was removed, or its save never ended"
    if reason is not None:
        raise IncidentError(f"{path}: {reason}; without these weights the step cannot be replayed")
    return path


def _say_what_changed(config: Config, run: Path) -> None:
    """The replay follows the incident's own configuration; say where the run's is another one by now."""
    try:
        now = dict(flatten(load_config(run)))
    except (ValueError, OSError):
        print(f"note: {run / 'config.yaml'} cannot be read; the incident's own copy is used", file=sys.stderr)
        return
    other = [name for name, value in flatten(config) if now.get(name) != value]
    if other:
        print(f"note: the run's config.yaml has another {', '.join(other)} by now", file=sys.stderr)
