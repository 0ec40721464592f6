"""The prepared data that a run would read, as far as it is there."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from data_prep.manifest import find_manifests
from pipeline.config.options import Config, weighted_paths
from pipeline.loading.open_data import TrainingData, open_training_data
from pipeline.tasks.task import Task, texts_of

TEXTS_READ = 200  # whose tokens are counted


def find_data(config: Config, task: Task) -> tuple[TrainingData | None, list[str]]:
    """The data opened as training opens it, or None and the reasons why that fails."""
    try:
        return open_training_data(config, task.num_images, texts=texts_of(task)), []
    except ValueError as error:
        return None, [str(error)]


def describe_data(config: Config, task: Task, data: TrainingData | None) -> list[dict[str, Any]]:
    """An entry for each split: ``name``, ``split``, ``samples``, ``shards``, or ``missing`` with the reason."""
    if data is None:
        return [_unopened(config, task, str(path), split) for path, _ in weighted_paths(config.data)
                for split in (config.data.train_split, config.data.eval_split) if split is not None]  # fmt: skip
    sizes = [*data.sizes, *(len(corpus) for corpus in data.held_out)]
    return [
        {"name": corpus.name, "split": corpus.manifest.split, "samples": size, "shards": len(corpus.manifest.shards)}
        for corpus, size in zip([*data.corpora, *data.held_out], sizes, strict=True)
    ]


def _unopened(config: Config, task: Task, path: str, split: str) -> dict[str, Any]:
    """What the manifests at a path say where training could not open the data."""
    try:
        found = find_manifests(path, split, task.num_images, texts_of(task), config.data.frames is not None)
    except ValueError as error:
        return {"name": path, "split": split, "missing": str(error)}
    manifests = [manifest for _, manifest in found]
    rows, shards = sum(one.rows for one in manifests), sum(len(one.shards) for one in manifests)
    return {"name": path, "split": split, "samples": rows, "shards": shards}


def mean_tokens(data: TrainingData, longest: int) -> float:
    """Tokens, both ends counted, of the first texts of each training corpus, on average; they are read, no image."""
    lengths: list[int] = []
    for corpus in data.corpora:
        count = max(1, min(len(corpus), TEXTS_READ // len(data.corpora)))
        lengths += [
            len(data.tokenizer.encode(corpus.read_text(number), longest)) for number in _spread(len(corpus), count)
        ]
    return statistics.mean(lengths)


def _spread(size: int, count: int) -> Sequence[int]:
    return range(0, size - size % count, size // count)
