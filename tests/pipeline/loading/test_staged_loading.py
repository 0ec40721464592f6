"""Batches are the same tensors whether shards are read from copies that come and go, or from the originals."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_prep.stores.kept_files import own_folder
from pipeline.data.order import SampleOrder
from pipeline.data.shard_reader import Corpus
from pipeline.loading.loader import LoaderOptions
from pipeline.staging import node_folder, plan
from pipeline.staging.node_folder import READY, name_of
from pipeline.staging.plan import ReadsAhead
from pipeline.staging.stager import Stager
from tests.pipeline.loading.loader_data import Data, same


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_equal_while_copies_come_and_go(data: Data, tmp_path: Path, monkeypatch, workers: int) -> None:
    """Room for two of seven shards, so that most are copied and removed again and again while they are read."""
    monkeypatch.setattr(node_folder, "SPARE_BYTES", 0)
    monkeypatch.setattr(plan, "STRETCH_SAMPLES", 4)
    monkeypatch.setattr(plan, "NUM_STRETCHES", 2)
    monkeypatch.setattr(plan, "SHARE_TO_DISPLACE", 0)
    options, steps = LoaderOptions(num_workers=workers, prefetch=1), 40
    expected = list(data.train(stop=steps, options=options))

    staged = Data([Corpus(corpus.split_dir) for corpus in data.corpora], data.tokenizer, data.planner)
    samples = [corpus.manifest.shards.rows for corpus in staged.corpora]
    order = SampleOrder([len(corpus) for corpus in staged.corpora], seed=5)
    stager = Stager(
        own_folder(tmp_path),
        staged.corpora,
        ReadsAhead(order, samples, [0], 1, 4, 1, steps),
        np.concatenate(samples),
        1,
    )
    stager._limit = 2 * int(stager._sizes.max())
    removed, copied = [], []
    for name, calls in (("remove", removed), ("add", copied)):
        method = getattr(node_folder.NodeFolder, name)
        monkeypatch.setattr(node_folder.NodeFolder, name, noting(method, calls))
    stager.take_folders()
    for corpus in staged.corpora:
        corpus.read_copies_in(own_folder(tmp_path) / name_of(corpus.manifest) / READY)
    stager.start(0)
    step = 0
    for step, batch in enumerate(staged.train(stop=steps, options=options)):
        stager.follow(step + 1)
        assert same(batch, expected[step]), step
    stager.close()
    assert step == steps - 1 and copied


def noting(method, calls: list):
    def noted(self, number, *rest):
        calls.append(number)
        return method(self, number, *rest)

    return noted


def test_batches_are_equal_with_damaged_copies_and_without_originals(data: Data, tmp_path: Path, monkeypatch) -> None:
    folders = [Path(shutil.copytree(one.split_dir, tmp_path / "data" / one.name / "train")) for one in data.corpora]
    staged = Data([Corpus(folder) for folder in folders], data.tokenizer, data.planner)
    for number, corpus in enumerate(staged.corpora):
        copies = Path(shutil.copytree(corpus.split_dir, tmp_path / "copies" / str(number)))
        os.truncate(copies / "00001.tar", 600)
        corpus.read_copies_in(copies)
        for path in corpus.split_dir.glob("*0.tar"):
            path.unlink()  # read from its copy
    pairs = zip(staged.train(stop=12), data.train(stop=12), strict=True)
    assert all(same(one, other) for one, other in pairs)
