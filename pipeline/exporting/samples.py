"""A few samples to compare the exported model with the run's by: held-out ones, or generated pixels and texts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from data_prep.manifest import ManifestError
from model.batch import Batch
from pipeline.config.options import Config
from pipeline.data.open_shards import DataError
from pipeline.data.shard_reader import RawSample
from pipeline.data.tokenizer import TextTokenizer
from pipeline.data.transforms import UnusableSample
from pipeline.loading.collate import Item, collate
from pipeline.loading.datasets import OtherRows
from pipeline.loading.open_data import open_held_out
from pipeline.pictures.pictures import pictures_of
from pipeline.tasks.task import Task, texts_of

NUM_SAMPLES, NUM_WORDS = 4, 12
TRIED = 4 * NUM_SAMPLES  # rows of held-out data that are looked at


class Sample(NamedTuple):
    """One sample: its pixels uint8 [I, 3, S, S], and what its rows are made of."""

    raw: RawSample
    pixels: Tensor
    seed: int
    others: OtherRows


@dataclass(frozen=True)
class Texts:
    """Stands for a corpus where only other texts are asked for."""

    texts: Sequence[str]

    def read_text(self, number: int) -> str:
        return self.texts[number]


def find_samples(config: Config, task: Task, tokenizer: TextTokenizer) -> tuple[list[Sample], str]:
    """Some samples, and what they are in words: of the held-out split where it is there, else generated."""
    try:
        found = _held_out(config, task)
    except (ValueError, OSError, ManifestError, DataError) as error:  # no reason not to export
        print(f"held-out data is not to be had ({error}); pixels and words are generated", file=sys.stderr)
        found = []
    if found:
        return found, f"{len(found)} samples of the held-out split {config.data.eval_split}"
    return _generated(config, task, tokenizer), f"{NUM_SAMPLES} generated samples (random pixels and words)"


def batch_of(
    samples: Sequence[Sample], config: Config, task: Task, objective: nn.Module, tokenizer: TextTokenizer
) -> Batch:
    """The batch of an objective that the samples make; raises UnusableSample where none of them fits the task."""
    preparation, items = task.preparation(config, objective, tokenizer), []
    for one in samples:
        rows = preparation.maker.rows(one.raw, one.seed, one.others)
        items.append(Item(one.raw.key, rows))
    return collate(items, torch.stack([one.pixels for one in samples]), preparation.planner, range(len(items)))


def _held_out(config: Config, task: Task) -> list[Sample]:
    """The first usable rows of images that differ, or clips, of the held-out split."""
    pictures, found = pictures_of(config), []
    for corpus in open_held_out(config, task.num_images, texts=texts_of(task)):
        rows = np.unique(np.linspace(0, len(corpus) - 1, min(TRIED, len(corpus))).astype(np.int64)).tolist()
        for row in rows:
            if len(found) == NUM_SAMPLES:
                return found
            try:
                raw = corpus.read(row)
                found.append(Sample(raw, pictures.of(raw), row, OtherRows(corpus, row, range(len(corpus)))))
            except UnusableSample:
                continue
    return found


def _generated(config: Config, task: Task, tokenizer: TextTokenizer) -> list[Sample]:
    """Random pixels, and texts of random words of the tokenizer, with what the tasks ask of metadata."""
    generator, size = np.random.default_rng(0), config.model.vision.image_size
    special = {getattr(tokenizer.vocabulary, f"{role}_id") for role in ("bos", "pad", "eos", "mask")}
    ids = [number for number in tokenizer.tokens.values() if number not in special]
    texts = [tokenizer.decode(generator.choice(ids, NUM_WORDS).tolist()) or "a" for _ in range(NUM_SAMPLES)]
    shape = (config.data.frames or task.num_images, 3, size, size)
    found = []
    for number, text in enumerate(texts):
        pixels = torch.from_numpy(generator.integers(0, 256, shape, dtype=np.uint8))
        meta = {name: [number] for name in ("question_id", "identifier", "pair_id")} | {"captions": [text]}
        raw = RawSample(f"generated {number}", [], text, meta)
        found.append(Sample(raw, pixels, number, OtherRows(Texts(texts), number, range(NUM_SAMPLES))))
    return found
