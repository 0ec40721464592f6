"""What an evaluation says of a run, in this process: a reference for whatever else computes predictions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from pipeline.data.shard_reader import Corpus
from pipeline.distributed.places import Place
from pipeline.distributed.preempt import StopRequest
from pipeline.distributed.ranks import Agreement
from pipeline.finetuning.table import task_of
from pipeline.loading.open_data import open_held_out
from pipeline.tasks.evaluation import evaluate
from pipeline.tasks.task import EvaluationRanks
from pipeline.tasks.trained_run import read_run, use_files_of_run
from pipeline.weights.starting import load_trained


def predictions_of(run: Path) -> tuple[list[dict[str, Any]], list[Corpus]]:
    """Predictions of the first pass over the held-out split, in order, and its corpora."""
    found = read_run(run)
    config, task = found.config, task_of(found.config)
    config.train.eval_samples, config.optim.micro_batch_size = None, 4
    use_files_of_run(config, task, found.folder)
    objective = task.build(config, found.tokenizer.vocabulary).eval()
    load_trained(objective, config.model, found.checkpoint)
    preparation, corpora = task.preparation(config, objective, found.tokenizer), open_held_out(config, task.num_images)
    first = task.passes(
        config, objective, preparation, corpora, EvaluationRanks(Place(0, 1, 0, "single"), in_training=True)
    )[0]
    kept: list[dict[str, Any]] = []
    first = dataclasses.replace(first, write=lambda _, predictions: kept.extend(predictions))
    evaluate(lambda function, batch: function(objective, batch), [first], Agreement(), StopRequest(), Path("."))
    return kept, corpora
