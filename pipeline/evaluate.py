"""Held-out loss and accuracy of every term, with the own image and with another sample's.

    python -m pipeline.evaluate --run RUN [--data DIR...] [--split dev] [--samples N]

Exit codes: 0 done, 2 a wrong command line or nothing to evaluate, 75 told to stop.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from model.batch import Batch
from model.build import build_objective
from pipeline.checkpoint import load_into, resolve
from pipeline.command_line import load_config
from pipeline.config import Config, fail, tokenizer_source
from pipeline.loader import BatchLoader
from pipeline.open_data import eval_loader, open_held_out, placeholder_batch
from pipeline.preempt import EXIT_PREEMPTED, StopRequest
from pipeline.ranks import Agreement, Place
from pipeline.tokenizer import load_tokenizer

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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="run folder, or one of its checkpoint folders")
    parser.add_argument("--data", nargs="+", metavar="DIR", help="data to evaluate on (default: the run's)")
    parser.add_argument("--split", help="split to evaluate on (default: the run's data.eval_split)")
    parser.add_argument("--samples", type=int, help="held-out samples, evenly spaced (default: all)")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if arguments.samples is not None and arguments.samples < 1:
            raise ValueError(f"--samples: found {arguments.samples}, expected at least 1")
        config = load_config(resolve(arguments.run).parent.parent)
        config.data.paths = arguments.data or config.data.paths
        config.data.eval_split = arguments.split or config.data.eval_split
        config.train.eval_samples = arguments.samples
        values = evaluate_run(arguments.run, config, device, StopRequest().listen())
    except ValueError as error:
        return fail(error)
    if values is None:
        return EXIT_PREEMPTED
    print(json.dumps({name: round(value, 6) for name, value in values.items()}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
