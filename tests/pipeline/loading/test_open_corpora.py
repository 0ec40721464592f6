"""Opening corpora: many shards at little cost, copies in other processes, refusals, what tells two corpora apart."""

from __future__ import annotations

import os
import pickle

import pytest

from data_prep.manifest import Manifest, ManifestError, write_manifest
from pipeline.data.open_shards import OpenShards
from pipeline.data.shard_reader import Corpus, open_corpora
from tests.pipeline.data.test_reader import FIELDS, records, write_split


def test_copies_read_on_their_own(tmp_path):
    corpus = Corpus(write_split(tmp_path / "train", records(8)))
    corpus.read(0)
    copied = pickle.loads(pickle.dumps(corpus))
    corpus.close()
    assert copied.read(7).key == "k0007" and corpus.read(7).key == "k0007"
    child = os.fork()
    if child == 0:
        os._exit(0 if corpus.read(0).key == "k0000" and corpus.read(7).key == "k0007" else 1)
    assert os.waitpid(child, 0)[1] == 0 and corpus.read(1).key == "k0001"


def test_open_files_are_bounded(tmp_path):
    corpus = Corpus(write_split(tmp_path / "train", records(40), samples_per_shard=2), kept=OpenShards(3))
    before = len(os.listdir("/proc/self/fd"))
    for index in list(range(40)) * 2:
        assert corpus.read(index).key == f"k{index:04d}"
    assert len(os.listdir("/proc/self/fd")) - before <= 6
    corpus.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_open_corpora(tmp_path):
    write_split(tmp_path / "b" / "train", records(3), corpus="b")
    write_split(tmp_path / "a" / "train", records(2), corpus="a")
    assert [(corpus.name, len(corpus)) for corpus in open_corpora([tmp_path], "train")] == [("a", 2), ("b", 3)]
    assert [corpus.name for corpus in open_corpora([str(tmp_path / "b"), tmp_path / "a" / "train"], "train")] == [
        "b",
        "a",
    ]
    with pytest.raises(ManifestError, match="given twice"):
        open_corpora([tmp_path / "a", tmp_path], "train")
    with pytest.raises(ManifestError, match="python -m data_prep"):
        open_corpora([tmp_path / "nothing"], "train")


def test_empty_split_is_refused(tmp_path):
    write_manifest_of_nothing = Manifest("toy", "train", FIELDS, ())
    (tmp_path / "train").mkdir()
    write_manifest(tmp_path / "train", write_manifest_of_nothing)
    with pytest.raises(ManifestError, match="no samples"):
        Corpus(tmp_path / "train")


def test_fingerprint_follows_the_content(tmp_path):
    one, same = (Corpus(write_split(tmp_path / name / "train", records(4))) for name in ("x", "y"))
    other = Corpus(write_split(tmp_path / "z" / "train", records(5)))
    assert one.fingerprint == same.fingerprint != other.fingerprint
