"""Runs the passes of an evaluation: in training on all ranks through the engine, or on a finished run by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.batch import Batch
from pipeline.checkpoint.restore import resolve
from pipeline.config.options import Config, tokenizer_source
from pipeline.data.tokenizer import load_tokenizer
from pipeline.distributed.places import Place
from pipeline.distributed.preempt import StopRequest
from pipeline.distributed.ranks import Agreement
from pipeline.loading.open_data import open_held_out
from pipeline.tasks.task import EvaluationPass, EvaluationRanks, Measurement, Prediction, Task
from pipeline.weights.starting import load_trained

Run = Callable[[Callable[[Any, Batch], Measurement], Batch], Measurement]  # a function of objective and batch, applied


def evaluate(
    run: Run,
    passes: Sequence[EvaluationPass],
    agreement: Agreement,
    stop: StopRequest,
    folder: Path | None = None,
) -> dict[str, float] | None:
    """The values of all passes by name; None when told to stop. Passes that write do so in ``folder``, if it is given.

    Equal on every rank; every rank must call it. Samples that could not be used are counted as ``bad_samples``, once.
    """
    values: dict[str, float] = {}
    bad_samples = 0
    for number, one in enumerate(passes):
        found = _sweep(run, one, agreement, stop)
        if found is None:
            return None
        totals, predictions, bad = found
        bad_samples = bad if number == 0 else bad_samples
        if one.write is not None and folder is not None and agreement.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            one.write(folder, predictions)
        values |= {f"{one.name}{name}": value for name, value in one.summarise(totals, predictions).items()}
    return values | ({"bad_samples": bad_samples} if bad_samples else {})


def _sweep(
    run: Run, one: EvaluationPass, agreement: Agreement, stop: StopRequest
) -> tuple[dict[str, float], list[Prediction], int] | None:
    """Sums of the quantities, predictions and number of unusable samples of a pass, over all ranks."""
    on_device: dict[str, list[Tensor]] = {name: [] for name in one.quantities}
    on_host = dict.fromkeys(one.quantities, 0.0)
    predictions: list[Prediction] = []
    bad_samples = 0
    if one.begin is not None:
        run(lambda objective, _: one.begin(objective), one.placeholder)
    batches = iter(one.batches)
    for _ in range(one.batches.most_batches):
        if agreement.total([stop.requested])[0]:
            return None
        batch = next(batches, None)
        measured = run(one.measure, one.placeholder if batch is None else batch)
        if batch is None:
            continue
        bad_samples += len(batch.problems)
        predictions += measured.predictions
        for name, value in measured.sums.items():
            if isinstance(value, Tensor):
                on_device[name].append(value)
            else:
                on_host[name] += value
    local = [on_host[name] + _total(on_device[name]) for name in one.quantities]
    *totals, bad = agreement.total([*local, bad_samples])
    has_predictions = agreement.total([len(predictions)])[0] > 0
    gathered = [item for rank in agreement.gather(predictions) for item in rank] if has_predictions else []
    gathered.sort(key=lambda item: item["position"])
    return dict(zip(one.quantities, totals, strict=True)), gathered, int(bad)


def _total(values: list[Tensor]) -> float:
    return float(torch.stack(values).double().sum(0)) if values else 0.0


def evaluate_run(
    run: Path, config: Config, task: Task, device: torch.device, stop: StopRequest
) -> dict[str, float] | None:
    """Evaluate the newest checkpoint of a run (or a checkpoint folder) in this process, without DeepSpeed."""
    checkpoint = resolve(run)
    copy = checkpoint.parent.parent / "tokenizer"
    tokenizer = load_tokenizer(copy if copy.is_dir() else tokenizer_source(config.data))
    corpora = open_held_out(config, task.num_images)
    if not corpora:
        raise ValueError(
            f"no split {config.data.eval_split!r} in {', '.join(config.data.paths)}; give --data or --split"
        )
    objective = task.build(config, tokenizer.vocabulary)
    load_trained(objective, config.model, checkpoint)
    objective.eval().to(device)
    preparation = task.preparation(config, objective, tokenizer)
    ranks = EvaluationRanks(Place(0, 1, 0, "single"), device.type == "cuda")
    passes = task.passes(config, objective, preparation, corpora, ranks)
    with torch.no_grad():
        return evaluate(lambda function, batch: function(objective, batch.to(device)), passes, Agreement(), stop)
