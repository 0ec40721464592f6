"""Descriptors: a process keeps within its limit whatever the number of corpora, and says so when it can't."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from pathlib import Path

import pytest

from pipeline.data import open_shards, shard_files
from pipeline.data.open_shards import DESCRIPTORS, MAX_OPEN_SHARDS, OpenShards, OutOfDescriptors, open_shards_limit
from pipeline.data.shard_reader import Corpus
from tests.pipeline.data.test_reader import records, write_split


def copies(folder: Path, corpora: int, shards: int) -> list[Corpus]:
    """Corpora of ``shards`` shards with one sample each, hard links of one."""
    first = write_split(folder / "0" / "train", records(shards), samples_per_shard=1)
    for number in range(1, corpora):
        shutil.copytree(first, folder / str(number) / "train", copy_function=os.link)
    return [Corpus(folder / str(number) / "train") for number in range(corpora)]


def test_64_corpora_are_read_with_a_limit_of_1024_descriptors(tmp_path: Path) -> None:
    """64 x 9 shards are 1,152 descriptors; with a budget of its own for each corpus, too many."""
    corpora = copies(tmp_path, corpora=64, shards=9)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
            open_shards.OF_THIS_PROCESS._limit = None  # as of a process that starts with this limit
            before = len(os.listdir("/proc/self/fd"))  # those of whatever this process ran before
            keys = {corpus.read(row).key for row in range(9) for corpus in corpora}
            assert keys == {f"k{row:04d}" for row in range(9)}
            code = 0 if len(os.listdir("/proc/self/fd")) - before <= 1024 // 4 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(
    ("soft", "expected"),
    [(20, 2), (256, 32), (1024, 128), (4096, 512), (10**6, MAX_OPEN_SHARDS), (resource.RLIM_INFINITY, MAX_OPEN_SHARDS)],
)
def test_a_quarter_of_the_limit_is_for_shards(monkeypatch, soft: int, expected: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, resource.RLIM_INFINITY))
    assert open_shards_limit() == expected and expected * DESCRIPTORS <= max(soft, 10**6) / 4


def test_shards_of_all_corpora_share_one_budget_least_recently_used_first(tmp_path: Path, opens: list[str]) -> None:
    kept = OpenShards(2)
    write_split(tmp_path / "a", records(2), samples_per_shard=1)
    write_split(tmp_path / "b", records(2), samples_per_shard=1)
    one, other = Corpus(tmp_path / "a", kept=kept), Corpus(tmp_path / "b", kept=kept)
    opens.clear()
    one.read(0), other.read(0), one.read(0), other.read(1)  # closes other's first shard, not one's
    assert opens == ["a/00000.tar", "b/00000.tar", "b/00001.tar"]
    one.read(0), other.read(1)
    assert len(opens) == 3
    other.read(0)
    assert opens[3:] == ["b/00000.tar"]
    one.close()
    one.read(0)
    assert opens[4:] == ["a/00000.tar"]


def test_shards_within_the_budget_are_opened_once_whatever_the_order(tmp_path: Path, opens: list[str]) -> None:
    """Shuffle `full` jumps from shard to shard: two opens a shard, not two a sample."""
    corpus = Corpus(write_split(tmp_path / "a", records(40), samples_per_shard=2), kept=OpenShards(20))
    opens.clear()
    for epoch in range(3):
        for row in range(40):
            corpus.read((row * 17 + epoch) % 40)
    assert len(opens) == 20


@pytest.fixture
def opens(monkeypatch) -> list[str]:
    """FOLDER/FILE of each tar that is opened from now on."""
    opened, original = [], os.open

    def counted(path, *arguments, **options):
        if str(path).endswith(".tar"):
            opened.append("/".join(Path(path).parts[-2:]))
        return original(path, *arguments, **options)

    monkeypatch.setattr(os, "open", counted)
    return opened


class Exhausted:
    """In place of ``os.open`` or ``os.pread``: refuses with ``number`` while more than ``most`` shards are open."""

    def __init__(self, original, number: int, kept: OpenShards, most: int) -> None:
        self.original, self.number, self.kept, self.most = original, number, kept, most

    def __call__(self, *arguments):
        if len(self.kept._open) > self.most:
            raise OSError(self.number, os.strerror(self.number))
        return self.original(*arguments)


def test_a_file_that_goes_stale_while_it_is_opened_is_opened_again(tmp_path: Path, monkeypatch) -> None:
    corpus = Corpus(write_split(tmp_path / "train", records(4)), kept=OpenShards(4))
    before, original, stale = len(os.listdir("/proc/self/fd")), os.fstat, [errno.ESTALE, errno.ENOMEM]

    def once_stale(descriptor):
        if stale:
            raise OSError(stale.pop(), "cannot be looked at")
        return original(descriptor)

    monkeypatch.setattr(os, "fstat", once_stale)
    assert corpus.read(0).key == "k0000" and not stale
    assert len(os.listdir("/proc/self/fd")) == before + DESCRIPTORS


@pytest.mark.parametrize("number", open_shards.EXHAUSTED)
@pytest.mark.parametrize("function", ["open", "pread"])
def test_shards_are_closed_when_the_machine_runs_out_and_the_sample_is_read(
    tmp_path: Path, monkeypatch, number: int, function: str
) -> None:
    kept = OpenShards(8)
    corpus = Corpus(write_split(tmp_path / "train", records(12), samples_per_shard=1), kept=kept)
    for row in range(8):
        corpus.read(row)
    monkeypatch.setattr(os, function, Exhausted(getattr(os, function), number, kept, most=5))
    assert [corpus.read(row).key for row in range(12)] == [f"k{row:04d}" for row in range(12)]
    assert len(kept._open) <= 5


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EMFILE, r"too many open files: the limit is \d+ per process \(ulimit -n\).*ulimit -n 4096"),
        (errno.ENFILE, "too many open files on this machine.*fs.file-max"),
        (errno.ENOMEM, "no memory left"),
    ],
)
@pytest.mark.parametrize("function", ["open", "pread"])
def test_a_machine_that_has_run_out_is_not_called_a_lost_disk(
    tmp_path: Path, monkeypatch, number: int, words: str, function: str
) -> None:
    monkeypatch.setattr(shard_files, "SHARD_SECONDS", 0.1)
    kept = OpenShards(8)
    corpus = Corpus(write_split(tmp_path / "train", records(3), samples_per_shard=1), kept=kept)
    corpus.read(0)
    original = getattr(os, function)
    monkeypatch.setattr(os, function, Exhausted(original, number, kept, most=-1))
    with pytest.raises(OutOfDescriptors, match=words):
        corpus.read(1)
    monkeypatch.setattr(os, function, original)
    assert corpus.read(1).key == "k0001"
