"""Held-out loss and accuracy of every term, with the own image and with another sample's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from model.batch import Batch
from model.build import build_objective
from pipeline.checkpoint.restore import load_into, resolve
from pipeline.config.options import Config, tokenizer_source
from pipeline.data.tokenizer import load_tokenizer
from pipeline.distributed.preempt import StopRequest
from pipeline.distributed.ranks import Agreement, Place
from pipeline.loading.loader import BatchLoader
from pipeline.loading.open_data import eval_loader, open_held_out, placeholder_batch

Score = Callable[[Batch], dict[str, tuple[Tensor, Tensor]]]
IMAGE_FREE = ("itm",)  # terms whose label speaks of the image itself mean nothing with another one


def evaluate(
    score: Score,
    loader: BatchLoader,
    shuffled_loader: BatchLoader | None,
    term_weights: Mapping[str, float],
    placeholder: Batch,
    agreement: Agreement,
    stop: StopRequest,
) -> dict[str, float] | None:
    """``loss``, ``{term}_loss``, ``{term}_accuracy``, ``shuffled/{term}_...``; None when told to stop.

    Equal on every rank; every rank must call it. Means are over the targets of the whole choice of samples, whatever
    the number of ranks. Samples that could not be used are counted as ``bad_samples``.
    """
    values = _pass(score, loader, term_weights, placeholder, agreement, stop)
    if values is None or shuffled_loader is None:
        return values
    kept = {name: weight for name, weight in term_weights.items() if name not in IMAGE_FREE}
    shuffled = _pass(score, shuffled_loader, kept, placeholder, agreement, stop)
    if shuffled is None:
        return None
    return values | {
        f"shuffled/{name}": value for name, value in shuffled.items() if name not in ("loss", "bad_samples")
    }


def _pass(
    score: Score,
    loader: BatchLoader,
    term_weights: Mapping[str, float],
    placeholder: Batch,
    agreement: Agreement,
    stop: StopRequest,
) -> dict[str, float] | None:
    names = sorted(term_weights)
    sums: dict[str, list[Tensor]] = {name: [] for name in names}
    counts = dict.fromkeys(names, 0)
    bad_samples = 0
    batches = iter(loader)
    for _ in range(loader.most_batches):
        if agreement.total([stop.requested])[0]:
            return None
        batch = next(batches, None)
        found = score(placeholder if batch is None else batch)
        if batch is None:
            continue
        bad_samples += len(batch.problems)
        for name in names:
            if name in found:
                sums[name].append(torch.stack(found[name]))
                counts[name] += batch.counts[name]
    local = [torch.stack(sums[name]).double().sum(0).tolist() if sums[name] else [0.0, 0.0] for name in names]
    flat = [number for name, pair in zip(names, local, strict=True) for number in (*pair, counts[name])]
    *totals, bad_samples = agreement.total([*flat, bad_samples])
    values: dict[str, float] = {}
    loss = 0.0
    for index, name in enumerate(names):
        loss_sum, correct, count = totals[3 * index : 3 * index + 3]
        if count:
            values[f"{name}_loss"], values[f"{name}_accuracy"] = loss_sum / count, correct / count
            loss += term_weights[name] * values[f"{name}_loss"]
    return {"loss": loss, **values} | ({"bad_samples": int(bad_samples)} if bad_samples else {})


def evaluate_run(run: Path, config: Config, device: torch.device, stop: StopRequest) -> dict[str, float] | None:
    """Evaluate the newest checkpoint of a run (or a checkpoint folder) in this process, without DeepSpeed."""
    checkpoint = resolve(run)
    copy = checkpoint.parent.parent / "tokenizer"
    tokenizer = load_tokenizer(copy if copy.is_dir() else tokenizer_source(config.data))
    corpora = open_held_out(config)
    if not corpora:
        raise ValueError(
            f"no split {config.data.eval_split!r} in {', '.join(config.data.paths)}; give --data or --split"
        )
    length = config.data.max_text_length
    objective = build_objective(config.model, config.objective, tokenizer.vocabulary, length, pretrained=False)
    load_into(objective, checkpoint)
    objective.eval().to(device)
    place, planner = Place(0, 1, 0, "single"), objective.planner
    loaders = [
        eval_loader(config, corpora, tokenizer, planner, place, device.type == "cuda", shuffle) for shuffle in (0, 1)
    ]
    placeholder = placeholder_batch(config, tokenizer, planner)
    score = lambda batch: objective.score(batch.to(device))  # noqa: E731
    return evaluate(score, *loaders, objective.term_weights, placeholder, Agreement(), stop)
