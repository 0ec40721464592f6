"""A split behind a web server reads as on a disk, whatever the server does; what is lost is lost as on a disk."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.manifest import ManifestError, find_manifests
from data_prep.stores import kept_files, requests
from data_prep.stores.address import Address
from data_prep.stores.failures import StoreMissing
from pipeline.data import shard_files
from pipeline.data.remote_shards import LostStore
from pipeline.data.shard_files import LostCorpus
from pipeline.data.shard_reader import Corpus, open_corpora
from pipeline.data.transforms import UnusableSample
from tests.hub_server import NAME, serving_hub
from tests.pipeline.data.test_reader import records, write_split
from tests.range_server import RangeServer, serving

pytestmark = pytest.mark.slow
NUM_ROWS = 12  # in 3 shards


@pytest.fixture(autouse=True)
def impatient(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(requests, "DEADLINE_SECONDS", 10.0)
    monkeypatch.setattr(requests, "_FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(requests, "_BUSY_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(shard_files, "SHARD_SECONDS", 0.2)
    monkeypatch.setattr(shard_files, "FOLDER_SECONDS", 0.5)
    monkeypatch.setattr(kept_files, "SPARE_BYTES", 0)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


@pytest.fixture
def split(tmp_path: Path) -> Path:
    return write_split(tmp_path / "www" / "toy" / "train", records(NUM_ROWS, captions=2))


@pytest.fixture
def server(split: Path) -> Iterator[RangeServer]:
    with serving(split.parents[1]) as running:
        yield running


@pytest.fixture
def remote(server: RangeServer) -> Corpus:
    (corpus,) = open_corpora([f"{server.url}/toy"], "train")
    server.asked.clear()
    return corpus


def rows(corpus: Corpus) -> list:
    return [corpus.read(row) for row in range(len(corpus))]


def of_tars(server: RangeServer) -> list[str]:
    return [wanted for _, path, wanted in server.asked if path.endswith(".tar") and wanted != "bytes=0-0"]


def test_samples_are_those_of_a_disk_by_one_request_each(split: Path, remote: Corpus, server: RangeServer) -> None:
    here = Corpus(split)
    assert remote.fingerprint == here.fingerprint and len(remote) == len(here)
    assert rows(remote) == rows(here) and len(of_tars(server)) == len(here)
    texts = [remote.read_text(row) for row in range(len(remote))]
    assert texts == [here.read_text(row) for row in range(len(here))] and len(of_tars(server)) == 2 * len(here)
    assert (remote.first_rows() == here.first_rows()).all()
    assert pickle.loads(pickle.dumps(remote)).read(5) == here.read(5)


def test_a_dataset_of_hugging_face_reads_as_a_disk(split: Path, monkeypatch) -> None:
    """Its file system would read 5 MiB ahead of each range."""
    with serving_hub(split.parents[1]) as server:
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        settings = {"ENDPOINT": server.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False}
        for name, value in settings.items():  # of the environment, read when it is imported
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        requests.open_anew()
        (remote,) = open_corpora([f"hf://datasets/{NAME}@main/toy"], "train")
        here = Corpus(split)
        assert remote.fingerprint == here.fingerprint
        server.asked.clear()
        assert rows(remote) == rows(here)
        ranges = [tuple(map(int, wanted.removeprefix("bytes=").split("-"))) for wanted in of_tars(server)]
        assert len(ranges) == len(here) and max(last - first for first, last in ranges) < 10_000
        server.faults = ["short", "ok", "short"]
        assert rows(remote) == rows(here) and server.faults == []
        with pytest.raises(StoreMissing, match="no such object"):
            requests.read_range(f"hf://datasets/{NAME}@main/toy/train/none.tar", 0, 10)
        with pytest.raises(StoreMissing, match="no such object"):
            requests.read_range("hf://datasets/user/other@main/a", 0, 10)
    requests.open_anew()


def test_read_ahead_gives_the_same_and_asks_once(split: Path, remote: Corpus, server: RangeServer) -> None:
    order = [17, 3, 4, 22, 0, 9, 9, 1]
    remote.read_ahead(order)
    assert [remote.read(row) for row in order] == [Corpus(split).read(row) for row in order]
    assert len(of_tars(server)) == len(order)


def test_an_index_is_asked_for_once(split: Path, remote: Corpus, server: RangeServer) -> None:
    remote.read_ahead(range(len(remote)))
    rows(remote)
    again = Corpus(remote.split_dir, remote.manifest)
    rows(again)
    indexes = [path for _, path, wanted in server.asked if path.endswith(".npy") and wanted != "bytes=0-0"]
    assert sorted(indexes) == [f"/toy/train/{number:05d}.index.npy" for number in range(3)]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_store_with_errors_and_short_reads_loses_nothing(
    split: Path, remote: Corpus, server: RangeServer, ahead: bool
) -> None:
    server.faults = ["cut", 500, "short", 503, "ok", "drop", 429, "cut", "ok", "ok"] * 3
    if ahead:
        remote.read_ahead(range(len(remote)))
    assert rows(remote) == rows(Corpus(split)) and server.faults == []


def test_a_store_that_fails_for_good_ends_the_run_and_costs_no_sample(
    remote: Corpus, server: RangeServer, monkeypatch
) -> None:
    monkeypatch.setattr(requests, "DEADLINE_SECONDS", 0.5)
    remote.read(0)
    server.always = 500
    with pytest.raises(LostStore, match=r"00000.tar: bytes \d+ to \d+ could not be had in .* start the same command"):
        remote.read(3)
    remote.read_ahead([5, 6])
    with pytest.raises(LostStore):
        remote.read(5)
    server.always = 403
    with pytest.raises(LostStore, match="refused .*credentials"):
        remote.read(7)


def test_lost_and_cut_shards_cost_their_samples_as_on_a_disk(split: Path, remote: Corpus, server: RangeServer) -> None:
    (split / "00001.tar").unlink()
    with pytest.raises(UnusableSample, match="missing shard") as error:
        remote.read(9)
    assert error.value.reason == "missing shard" and error.value.key == "toy/train/00001.tar#1"
    tar = split / "00002.tar"
    tar.write_bytes(tar.read_bytes()[:1024])
    with pytest.raises(UnusableSample) as error:
        remote.read(22)
    assert error.value.reason == "truncated shard"
    (split / "00000.index.npy").write_bytes(b"other")
    with pytest.raises(UnusableSample) as error:
        remote.read(0)
    assert error.value.reason == "unreadable index"


def test_a_split_that_is_gone_ends_the_run(split: Path, remote: Corpus) -> None:
    for file in split.iterdir():
        file.unlink()
    with pytest.raises(LostCorpus, match="is gone"):
        remote.read(9)


def test_a_missing_or_cut_file_is_named_at_the_start(split: Path, server: RangeServer) -> None:
    tar = split / "00002.tar"
    tar.write_bytes(tar.read_bytes()[:1024])
    with pytest.raises(ManifestError, match=r"00002.tar: 1024 bytes, its manifest says \d+: truncated or changed"):
        open_corpora([f"{server.url}/toy"], "train")
    (split / "00001.index.npy").unlink()
    with pytest.raises(ManifestError, match=r"00001.index.npy: named by the manifest but missing"):
        open_corpora([f"{server.url}/toy/train"], "train")
    with pytest.raises(ManifestError, match="no split 'dev' here"):
        open_corpora([f"{server.url}/toy"], "dev")


def test_a_root_of_corpora_is_found_in_a_store_that_lists(tmp_path: Path) -> None:
    files = pytest.importorskip("fsspec").filesystem("memory")
    here = [write_split(tmp_path / "root" / name / "train", records(5), corpus=name) for name in ("a", "b")]
    files.put(str(tmp_path / "root"), "/found", recursive=True)
    try:
        found = find_manifests("memory://found", "train")
        assert [folder for folder, _ in found] == [Address(f"memory://found/{name}/train") for name in ("a", "b")]
        corpora = open_corpora(["memory://found"], "train")
        assert [rows(one) for one in corpora] == [rows(Corpus(folder)) for folder in here]
        with pytest.raises(ManifestError, match="given twice"):
            open_corpora(["memory://found/a", "memory://found/a/train"], "train")
        files.rm("/found/b/train/manifest.json")
        with pytest.raises(ManifestError, match=r"memory://found/b/train: tar files without a manifest.json"):
            find_manifests("memory://found", "train")
    finally:
        files.rm("/found", recursive=True)


@pytest.mark.parametrize("value", ["../../elsewhere/00000.tar", "a/b.tar", "..", "s3://other/x.tar"])
def test_a_manifest_of_a_store_names_files_of_its_folder_only(split: Path, server: RangeServer, value: str) -> None:
    path = split / "manifest.json"
    path.write_text(path.read_text().replace("00001.tar", value))
    with pytest.raises(ManifestError, match="is not a plain file name inside the split"):
        open_corpora([f"{server.url}/toy"], "train")
