"""Two small corpora on real shards and their loaders, for the tests of this folder."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from model.batch import Batch
from model.plans.flm import FLMPlanner
from pipeline.data.order import SampleOrder
from pipeline.data.shard_reader import Corpus
from pipeline.data.tokenizer import TextTokenizer
from pipeline.loading.datasets import Preparation
from pipeline.loading.loader import BatchLoader, LoaderOptions, build_eval_loader, build_train_loader
from pipeline.tasks.caption_rows import CaptionRows

HERE = LoaderOptions(num_workers=0)
SIZE = 16


@dataclass
class Data:
    corpora: list[Corpus]
    tokenizer: TextTokenizer
    planner: FLMPlanner

    def train(
        self, world=1, rank=0, accumulation=1, micro_batch=4, start=0, stop=3, options=HERE, **changes
    ) -> BatchLoader:
        order = changes.pop("order", SampleOrder([len(corpus) for corpus in self.corpora], seed=5))
        arguments = dict(micro_batch=micro_batch, accumulation=accumulation)
        arguments |= dict(rank=rank, world=world, start_step=start, num_steps=stop, seed=7, options=options)
        arguments |= dict(skipped=changes.pop("skipped", ()), num_texts=changes.pop("num_texts", 1))
        return build_train_loader(self.corpora, order, self.preparation(**changes), **arguments)

    def evaluate(self, world=1, rank=0, batch_size=4, options=HERE, **changes) -> BatchLoader:
        arguments = dict(batch_size=batch_size, rank=rank, world=world, seed=7)
        return build_eval_loader(self.corpora, self.preparation(), **arguments, options=options, **changes)

    def preparation(self, planner=None) -> Preparation:
        planner = planner or self.planner
        return Preparation(CaptionRows(self.tokenizer, 12, planner.negative_share, planner.full_stop), planner, SIZE)


def rows_by_sample(batches: list[Batch]) -> list[tuple]:
    """Per sample, in order: key, image sum, and its rows' tokens without padding."""
    samples = []
    for batch in batches:
        for number, key in enumerate(batch.keys):
            mine = (batch.plan.image_of_row == number).nonzero().flatten().tolist()
            rows = tuple(tuple(batch.plan.text[row, : batch.plan.lengths[row]].tolist()) for row in mine)
            samples.append((key, int(batch.images[number].sum()), rows))
    return samples


def same(a: Batch, b: Batch) -> bool:
    """Equal in every tensor, name and word."""
    terms = [(one.terms[name].position, one.terms[name].target) for one in (a, b) for name in a.terms]
    pairs = [*zip(terms[: len(a.terms)], terms[len(a.terms) :], strict=True)]
    tensors = [(a.images, b.images), *((x, y) for one, other in pairs for x, y in zip(one, other, strict=True))]
    tensors += [(v, getattr(b.plan, k)) for k, v in vars(a.plan).items() if isinstance(v, torch.Tensor)]
    assert len(tensors) > 10
    kinds = [{name: (term.source, term.kind) for name, term in one.terms.items()} for one in (a, b)]
    words_equal = (a.keys, a.problems, a.plan.num_paired) == (b.keys, b.problems, b.plan.num_paired)
    return kinds[0] == kinds[1] and words_equal and all(torch.equal(x, y) for x, y in tensors)


def hangs(self, index):
    """In place of ``Corpus.read``."""
    time.sleep(60)
