"""Reading copies of shards: the samples are those of the originals, whatever happens to a copy."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import pytest

from pipeline.data import shard_copies, shard_files
from pipeline.data.open_shards import OpenShards
from pipeline.data.shard_files import LostCorpus
from pipeline.data.shard_reader import Corpus
from pipeline.data.transforms import UnusableSample
from tests.pipeline.data.test_reader import records, write_split

NUM_ROWS = 12  # in 3 shards


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return Corpus(write_split(tmp_path / "train", records(NUM_ROWS)))


@pytest.fixture
def copied(corpus: Corpus, tmp_path: Path) -> Corpus:
    """The same corpus with a copy of each shard."""
    shutil.copytree(corpus.split_dir, tmp_path / "copies")
    return reading_copies(corpus, tmp_path / "copies")


def reading_copies(corpus: Corpus, folder: Path) -> Corpus:
    corpus = Corpus(corpus.split_dir)
    corpus.read_copies_in(folder)
    return corpus


def rows(corpus: Corpus) -> list:
    return [corpus.read(row) for row in range(len(corpus))]


@pytest.fixture
def opens(monkeypatch) -> list[str]:
    """FOLDER/FILE of each file that is opened from now on."""
    opened, original = [], os.open

    def counted(path, *arguments, **options):
        opened.append("/".join(Path(path).parts[-2:]))
        return original(path, *arguments, **options)

    monkeypatch.setattr(os, "open", counted)
    return opened


def test_all_is_read_from_copies_and_no_original_is_opened(corpus: Corpus, copied: Corpus, opens: list[str]) -> None:
    assert rows(copied) == rows(corpus)
    assert [name for name in opens[:6] if name.startswith("copies/")] == opens[:6]
    assert pickle.loads(pickle.dumps(copied)).read(5) == corpus.read(5)


def test_a_copy_that_comes_later_is_used_from_then_on(corpus: Corpus, tmp_path: Path, opens: list[str]) -> None:
    staged = reading_copies(corpus, tmp_path / "copies")
    expected = rows(corpus)
    assert rows(staged) == expected
    shutil.copytree(corpus.split_dir, tmp_path / "copies")
    opens.clear()
    assert rows(staged) == expected
    assert {name for name in opens if name.endswith(".tar")} == {f"copies/0000{number}.tar" for number in range(3)}


@pytest.mark.parametrize(
    "damage", ["truncated", "empty", "overwritten", "index empty", "index other", "folder", "pipe"]
)
def test_a_damaged_copy_costs_nothing(corpus: Corpus, copied: Corpus, tmp_path: Path, damage: str) -> None:
    tar, index = tmp_path / "copies" / "00001.tar", tmp_path / "copies" / "00001.index.npy"
    size = tar.stat().st_size
    if damage == "truncated":
        os.truncate(tar, size // 2)
    elif damage == "empty":
        os.truncate(tar, 0)
    elif damage == "overwritten":
        tar.write_bytes(bytes(size))
    elif damage == "index empty":
        os.truncate(index, 0)
    elif damage == "index other":
        content = bytearray(index.read_bytes())
        content[128:256] = bytes([1]) * 128
        index.write_bytes(content)
    else:
        tar.unlink()
        os.mkdir(tar) if damage == "folder" else os.mkfifo(tar)
    assert rows(copied) == rows(corpus)
    assert rows(copied) == rows(corpus)


def test_a_sample_that_is_bad_in_the_original_is_bad_with_its_reason(corpus: Corpus, tmp_path: Path) -> None:
    bad = corpus.split_dir / "00002.tar"
    content = bytearray(bad.read_bytes())
    content[:512] = bytes(512)
    bad.write_bytes(content)
    shutil.copytree(corpus.split_dir, tmp_path / "copies")
    found = []
    for one in (Corpus(corpus.split_dir), reading_copies(corpus, tmp_path / "copies")):
        with pytest.raises(UnusableSample) as caught:
            one.read(8)
        found.append((caught.value.key, caught.value.reason))
        assert one.read(9).key == "k0009"
    assert found[0] == found[1]


def test_disks_that_fail_all_the_time_are_left_alone(corpus: Corpus, tmp_path: Path, monkeypatch, opens) -> None:
    shutil.copytree(corpus.split_dir, tmp_path / "copies")
    for tar in (tmp_path / "copies").glob("*.tar"):
        os.truncate(tar, 0)
    monkeypatch.setattr(shard_copies, "MAX_DISTRUSTED", 2)
    staged = reading_copies(corpus, tmp_path / "copies")
    opens.clear()
    assert rows(staged) == rows(corpus)
    assert [name for name in opens if name.startswith("copies/") and name.endswith("2.tar")] == []


def test_the_room_of_removed_copies_is_given_back(corpus: Corpus, copied: Corpus, tmp_path: Path, monkeypatch) -> None:
    """An open file keeps its room: of those that are opened, every third one here closes those that were removed."""

    def held() -> list[str]:
        links = (os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd"))
        return [link for link in links if "copies" in link and "deleted" in link]

    kept = OpenShards(8)
    monkeypatch.setattr(shard_copies, "OPENED_PER_LOOK", 3)
    copied.read_copies_in(tmp_path / "copies", kept)
    copied.read(0), copied.read(4)
    for name in ("00000.tar", "00000.index.npy", "00001.tar", "00001.index.npy"):
        os.unlink(tmp_path / "copies" / name)
    assert copied.read(1) == corpus.read(1) and len(held()) == 4, "who has it open reads on"
    copied.read(8)
    assert held() == []
    assert copied.read(1) == corpus.read(1)


def test_copies_are_read_while_the_original_is_gone_and_only_then_is_the_run_told(
    copied: Corpus, tmp_path: Path, monkeypatch
) -> None:
    for name in ("SHARD_SECONDS", "FOLDER_SECONDS"):
        monkeypatch.setattr(shard_files, name, 0.0)
    expected = rows(Corpus(copied.split_dir))
    os.rename(copied.split_dir, tmp_path / "away")
    assert rows(copied) == expected
    os.unlink(tmp_path / "copies" / "00001.tar")
    copied.close()
    with pytest.raises(LostCorpus, match="is gone"):
        copied.read(4)


def test_samples_read_from_copies_count_against_a_lost_disk(copied: Corpus, tmp_path: Path, monkeypatch) -> None:
    """A run without copies goes on past single missing shards, as others are read between them; so does one with."""
    monkeypatch.setattr(shard_files, "SHARD_SECONDS", 0.0)
    monkeypatch.setattr(shard_files, "MAX_LOST_IN_A_ROW", 2)
    for number in (0, 2):
        for folder in (copied.split_dir, tmp_path / "copies"):
            os.unlink(folder / f"0000{number}.tar")
    for row in (0, 4, 8):
        if row == 4:
            assert copied.read(row).key == "k0004"
        else:
            with pytest.raises(UnusableSample) as caught:
                copied.read(row)
            assert caught.value.reason == "missing shard"
