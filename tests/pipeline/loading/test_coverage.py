"""Exactly once, whatever happens: any ranks, workers, restarts and mixes give the same global batches and scores."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.build import build_objective
from pipeline.config.options import Config
from pipeline.data.order import SampleOrder
from pipeline.data.tokenizer import load_tokenizer
from pipeline.distributed.places import Place
from pipeline.distributed.preempt import StopRequest
from pipeline.distributed.ranks import Agreement
from pipeline.loading.batch_positions import TrainBatches
from pipeline.loading.loader import LoaderOptions
from pipeline.loading.open_data import open_held_out
from pipeline.loading.shared_batches import SlotSampler
from pipeline.tasks.evaluation import evaluate
from pipeline.tasks.pretraining import Pretraining
from pipeline.tasks.task import EvaluationRanks
from tests.forked_ranks import run_ranks
from tests.pipeline.data.test_reader import records, write_split
from tests.pipeline.data.test_tokenizer import write_tokenizer
from tests.pipeline.loading.loader_data import Data, rows_by_sample
from tests.tiny_flm import tiny_config

Triple = tuple[int, int, int]  # corpus, index, epoch


@dataclass
class Part:
    """A stretch of a run between two restarts."""

    world: int
    micro_batch: int
    accumulation: int
    num_workers: int
    first_step: int
    worker_order: list[int]


@dataclass
class Run:
    sizes: list[int]
    weights: list[float] | None
    order: dict = field(default_factory=dict)  # arguments of SampleOrder
    batch_size: int = 1
    num_steps: int = 1
    parts: list[Part] = field(default_factory=list)
    skipped: frozenset[int] = frozenset()

    def sample_order(self) -> SampleOrder:
        return SampleOrder(self.sizes, weights=self.weights, **self.order)


def divisors(number: int, largest: int) -> list[int]:
    return [candidate for candidate in range(1, min(number, largest) + 1) if number % candidate == 0]


@st.composite
def runs(draw) -> Run:
    sizes = draw(st.lists(st.integers(1, 120), min_size=1, max_size=4))
    weights = draw(st.none() | st.lists(st.floats(0.1, 10), min_size=len(sizes), max_size=len(sizes)))
    order = draw(
        st.fixed_dictionaries({
            "seed": st.integers(0, 2**63 - 1),
            "shuffle": st.sampled_from(["full", "blocks"]),
            "block_rows": st.integers(1, 50),
            "window_blocks": st.integers(1, 8),
        })
    )  # fmt: skip
    batch_size = draw(st.integers(1, 64)) * draw(st.integers(1, 3))
    num_steps = draw(st.integers(1, max(2, 300 // batch_size)))
    parts = []
    for step in sorted({0, *draw(st.lists(st.integers(0, num_steps - 1), max_size=4))}):
        world = draw(st.sampled_from(divisors(batch_size, 64)))
        micro_batch = draw(st.sampled_from(divisors(batch_size // world, 8)))
        workers = draw(st.integers(0, 8))
        parts.append(
            Part(world, micro_batch, batch_size // world // micro_batch, workers, step, draw(st.permutations(range(8))))
        )
    skipped = draw(st.frozensets(st.integers(0, num_steps - 1), max_size=2))
    return Run(sizes, weights, order, batch_size, num_steps, parts, skipped)


def dealt(part: Part, batches: Iterable[range], make: Callable[[range], list[Triple]]) -> list[list[Triple]]:
    """What the loader yields: batch k is made by worker k mod W, a copy that knows of no other, at any time."""
    tasks = [positions for _, positions in SlotSampler(batches, None)]
    if part.num_workers == 0:
        return [make(positions) for positions in tasks]
    made: dict[int, list[Triple]] = {}
    for worker in (worker for worker in part.worker_order if worker < part.num_workers):
        copy = pickle.loads(pickle.dumps(make))
        made |= {k: copy(tasks[k]) for k in range(worker, len(tasks), part.num_workers)}
    return [made[k] for k in range(len(tasks))]


@dataclass
class Look:
    order: SampleOrder

    def __call__(self, positions: range) -> list[Triple]:
        return list(zip(*(column.tolist() for column in self.order.at_many(positions))))


def global_batches(run: Run) -> dict[int, list[Triple]]:
    """The samples of each step, put together from what every rank of every part of the run was given."""
    result: dict[int, list[Triple]] = {}
    ends = [part.first_step for part in run.parts[1:]] + [run.num_steps]
    for part, end in zip(run.parts, ends, strict=True):
        streams = []
        for rank in range(part.world):
            shape = (part.micro_batch, part.accumulation)
            batches = TrainBatches(part.first_step, run.num_steps, rank, part.world, *shape, run.skipped)
            streams.append(iter(dealt(part, batches, Look(run.sample_order()))))
            assert len(batches) == len(list(batches))
        for step in range(part.first_step, end):  # killed here: what was loaded ahead is lost, and loaded again
            if step not in run.skipped:
                result[step] = [
                    triple for _ in range(part.accumulation) for stream in streams for triple in next(stream)
                ]
    return result


@pytest.mark.slow
@settings(max_examples=40)
@given(run=runs())
def test_global_batches_are_the_same_and_cover_every_sample_once(run: Run) -> None:
    """Invariant 1: 1 to 64 ranks, 0 to 8 workers, restarts, mixes and both shuffles."""
    found = global_batches(run)
    size, total = run.batch_size, run.num_steps * run.batch_size
    stream = Look(run.sample_order())(range(total))
    assert found == {
        step: stream[step * size : (step + 1) * size] for step in range(run.num_steps) if step not in run.skipped
    }
    assert_exactly_once(stream, run)
    seen = Counter(triple for batch in found.values() for triple in batch)
    assert sum(seen.values()) == total - size * len(run.skipped) and set(seen.values()) <= {1}


def assert_exactly_once(stream: list[Triple], run: Run) -> None:
    """No (corpus, index) twice in an epoch, and no epoch begins before every sample of the one before was seen."""
    assert max(Counter(stream).values()) == 1
    corpora = range(len(run.sizes))
    groups = [corpora] if run.weights is None else [[corpus] for corpus in corpora]
    for group in groups:  # which go through their epochs together
        mine = [triple for triple in stream if triple[0] in group]
        epochs = [epoch for _, _, epoch in mine]
        assert epochs == sorted(epochs)
        everything = {(corpus, index) for corpus in group for index in range(run.sizes[corpus])}
        for epoch in range(max(epochs, default=0)):
            assert {(corpus, index) for corpus, index, e in mine if e == epoch} == everything


@pytest.mark.slow
@settings(max_examples=30)
@given(size=st.integers(2, 300), batch_size=st.integers(1, 200), seed=st.integers(0, 2**31))
def test_the_last_batch_of_an_epoch_is_filled_from_the_next(size: int, batch_size: int, seed: int) -> None:
    """Training drops nothing and pads nothing: batches keep their size where epochs join, and no sample is missing."""
    order = SampleOrder([size], seed)
    steps = -(-2 * size // batch_size)
    seen = np.concatenate([order.at_many(range(s * batch_size, (s + 1) * batch_size))[1] for s in range(steps)])
    assert len(seen) == steps * batch_size >= 2 * size
    assert (np.bincount(seen[: 2 * size], minlength=size) == 2).all()


@pytest.mark.parametrize(
    "order",
    [
        SampleOrder([18, 13], 5),
        SampleOrder([18, 13], 5, [3.0, 1.0], "blocks", block_rows=4, window_blocks=2),
    ],
    ids=["full", "mixed blocks"],
)
def test_real_loaders_agree_over_ranks_workers_and_a_restart(data: Data, order: SampleOrder) -> None:
    """Invariant 1 with real processes: 12 samples a step, 6 steps, begun again at step 2 by other ranks and workers."""
    expected = rows_by_sample(list(data.train(order=order, micro_batch=12, stop=6)))
    assert len(expected) == 72

    def loaded(world: int, accumulation: int, micro_batch: int, workers: int, start: int, stop: int) -> list[tuple]:
        options = LoaderOptions(num_workers=workers, prefetch=2)
        loaders = [
            data.train(world, rank, accumulation, micro_batch, start, 6, options=options, order=order)
            for rank in range(world)
        ]
        streams = [iter(loader) for loader in loaders]
        batches = [next(stream) for _ in range((stop - start) * accumulation) for stream in streams]
        samples = rows_by_sample(batches)
        for loader in loaders:
            loader.close()
        return samples

    first = loaded(world=2, accumulation=2, micro_batch=3, workers=1, start=0, stop=2)
    assert first + loaded(world=1, accumulation=3, micro_batch=4, workers=3, start=2, stop=6) == expected
    assert first + loaded(world=4, accumulation=1, micro_batch=3, workers=0, start=2, stop=6) == expected


@pytest.fixture(scope="module")
def held_out_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """31 rows in two corpora, two of them unusable."""
    root = tmp_path_factory.mktemp("held_out")
    broken = [replace(r, images=(r.images[0][:99],)) if n in (2, 7) else r for n, r in enumerate(records(13))]
    write_split(root / "a" / "dev", records(9, captions=2), corpus="a")
    write_split(root / "b" / "dev", broken, corpus="b")
    write_tokenizer(root / "tokenizer")
    return root


def score(place: Place, folder: Path) -> dict[str, float]:
    config = Config(model=tiny_config())
    config.data.paths, config.data.max_text_length, config.data.num_workers = [str(folder)], 12, 0
    config.optim.micro_batch_size, config.train.eval_samples = 4, None
    tokenizer = load_tokenizer(folder / "tokenizer")
    torch.manual_seed(3)
    objective = build_objective(config.model, config.objective, tokenizer.vocabulary, 12).eval()
    corpora = open_held_out(config)
    task = Pretraining()
    preparation = task.preparation(config, objective, tokenizer)
    passes = task.passes(config, objective, preparation, corpora, EvaluationRanks(place))
    return evaluate(lambda function, batch: function(objective, batch), passes, Agreement(), StopRequest())


@pytest.mark.slow
def test_the_score_does_not_depend_on_the_number_of_ranks(held_out_folder: Path) -> None:
    """8 batches over 1, 2, 3 and 5 ranks; every sample counts once, the unusable ones are counted as such."""
    [alone] = run_ranks(1, score, held_out_folder)
    assert alone["bad_samples"] == 2 and alone["loss"] > 0 and alone["shuffled/flm_loss"] > 0
    for world in (2, 3, 5):
        for found in run_ranks(world, score, held_out_folder):
            assert found == pytest.approx(alone, rel=1e-12)
