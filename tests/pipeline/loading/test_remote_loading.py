"""Batches of corpora behind a web server are the tensors of a disk's, with copies on the node, ahead, and on faults."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_prep.stores import kept_files, requests
from data_prep.stores.address import Address
from data_prep.stores.kept_files import own_folder
from pipeline.data.order import SampleOrder
from pipeline.data.shard_reader import Corpus
from pipeline.loading.loader import LoaderError, LoaderOptions
from pipeline.staging import node_folder
from pipeline.staging.node_folder import READY, NodeFolder, name_of
from pipeline.staging.plan import ReadsAhead
from pipeline.staging.stager import Stager
from tests.pipeline.loading.loader_data import Data, same
from tests.range_server import RangeServer, serving

pytestmark = pytest.mark.slow


@pytest.fixture
def server(data: Data, monkeypatch) -> Iterator[RangeServer]:
    for name, value in {"_FIRST_PAUSE_SECONDS": 0.01, "_BUSY_PAUSE_SECONDS": 0.02, "DEADLINE_SECONDS": 20.0}.items():
        monkeypatch.setattr(requests, name, value)
    for module in (kept_files, node_folder):
        monkeypatch.setattr(module, "SPARE_BYTES", 0)
    # Not below tmp_path: loader processes have sockets there, whose names may have 107 characters.
    with tempfile.TemporaryDirectory() as folder, serving(data.corpora[0].split_dir.parents[1]) as running:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield running


@pytest.fixture
def remote(data: Data, server: RangeServer) -> Data:
    corpora = [Corpus(Address(f"{server.url}/{name}/train")) for name in ("a", "b")]
    server.asked.clear()
    return Data(corpora, data.tokenizer, data.planner)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("num_texts", [1, 2])
def test_batches_are_equal_on_faults(
    data: Data, remote: Data, server: RangeServer, workers: int, num_texts: int
) -> None:
    options = LoaderOptions(num_workers=workers, prefetch=1)
    sizes = [corpus.manifest.samples if num_texts > 1 else len(corpus) for corpus in data.corpora]
    order = SampleOrder(sizes, seed=5, shuffle="blocks", block_rows=4, window_blocks=2)
    more = dict(stop=8, options=options, num_texts=num_texts, order=order)
    expected = list(data.train(**more))
    server.faults = ["cut", 500, "ok", "short", 503, "ok", "ok", "drop"] * 2
    found = list(remote.train(**more))
    assert len(found) == 8 and all(same(a, b) for a, b in zip(found, expected, strict=True))


def test_evaluation_is_equal(data: Data, remote: Data) -> None:
    for more in ({}, {"images": "shuffled"}, {"texts_per_image": 2}):
        found, expected = list(remote.evaluate(**more)), list(data.evaluate(**more))
        assert all(same(a, b) for a, b in zip(found, expected, strict=True))


def test_batches_come_from_copies_of_the_node_and_the_store_is_asked_no_more(
    data: Data, remote: Data, server: RangeServer, tmp_path: Path
) -> None:
    samples = [corpus.manifest.shards.rows for corpus in remote.corpora]
    order = SampleOrder([len(corpus) for corpus in remote.corpora], seed=5)
    ahead = ReadsAhead(order, samples, [0], 1, 4, 1, 10)
    stager = Stager(own_folder(tmp_path), remote.corpora, ahead, np.concatenate(samples), 2**30)
    stager.take_folders()
    server.faults = ["cut", 500, "short"]
    while (move := stager._next_move()) is not None:
        stager._carry_out(move)
    for corpus in remote.corpora:
        corpus.read_copies_in(own_folder(tmp_path) / name_of(corpus.manifest) / READY)
    server.asked.clear()
    found, expected = list(remote.train(stop=10)), list(data.train(stop=10))
    assert all(same(a, b) for a, b in zip(found, expected, strict=True)) and server.asked == []
    ready = own_folder(tmp_path) / name_of(remote.corpora[0].manifest) / READY
    (ready / "00000.tar").unlink()
    move = stager._next_move()
    assert move is not None and move.copy == 0  # a removed copy is fetched again
    stager._carry_out(move)
    stager.close()
    assert (ready / "00000.tar").read_bytes() == (data.corpora[0].split_dir / "00000.tar").read_bytes()


def test_a_copy_of_other_bytes_is_not_used(remote: Data, data: Data, server: RangeServer, tmp_path: Path) -> None:
    corpus = remote.corpora[0]
    folder = NodeFolder(own_folder(tmp_path), corpus.split_dir, corpus.manifest)
    assert folder.take()
    tar = data.corpora[0].split_dir / "00001.tar"
    before = tar.read_bytes()
    try:
        tar.write_bytes(before[:600] + bytes([before[600] ^ 1]) + before[601:])
        with pytest.raises(node_folder.OtherContent, match="its SHA-256 is not that of its manifest"):
            folder.add(1)
        tar.unlink()
        with pytest.raises(Exception, match="missing shard"):
            folder.add(1)
    finally:
        tar.write_bytes(before)
    server.always = 500
    requests_deadline, requests.DEADLINE_SECONDS = requests.DEADLINE_SECONDS, 0.3
    with pytest.raises(OSError, match="could not be had"):
        folder.add(1)
    requests.DEADLINE_SECONDS = requests_deadline
    assert list((folder.path / READY).iterdir()) == []
    folder.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_store_that_is_gone_ends_loading_with_the_code_to_try_again(
    remote: Data, server: RangeServer, monkeypatch, workers: int
) -> None:
    monkeypatch.setattr(requests, "DEADLINE_SECONDS", 0.5)
    server.always = 503
    with pytest.raises(LoaderError, match="could not be had in .* it continues from the last checkpoint") as error:
        list(remote.train(options=LoaderOptions(num_workers=workers)))
    assert error.value.code == 75
