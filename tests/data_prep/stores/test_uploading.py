"""Uploads to a real S3 server: resumable, the manifest last, never half a split, verified by hashes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.__main__ import main
from data_prep.manifest import ManifestError, find_manifests, load_manifest, open_index
from data_prep.record import PrepError
from data_prep.stores import requests
from data_prep.stores.address import Address
from data_prep.stores.failures import StoreUnreachable
from data_prep.uploads import uploading
from data_prep.uploads.uploading import plan_upload, upload_files, verify_uploads
from pipeline.data.shard_reader import Corpus
from tests.pipeline.data.test_reader import records, write_split
from tests.s3_server import BUCKET, s3_variables

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def variables() -> Iterator[dict[str, str]]:
    with s3_variables() as found:
        yield found


@pytest.fixture
def target(variables: dict[str, str], monkeypatch, request: pytest.FixtureRequest) -> Address:
    """An empty place in the bucket."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return Address(f"s3://{BUCKET}/{abs(hash(request.node.name))}")


@pytest.fixture
def split(tmp_path: Path) -> Path:
    folder = write_split(tmp_path / "corpus" / "train", records(12))
    (folder / ".hidden").write_text("x")
    (tmp_path / "corpus" / "answers.json").write_text("[]")
    return folder


def test_a_corpus_is_uploaded_once_and_verified(split: Path, target: Address, capsys) -> None:
    corpus = split.parent
    assert main(["upload", str(corpus), str(target), "--verify"]) == 0
    files = [path for path in corpus.rglob("*") if path.is_file() and not path.name.startswith(".")]
    assert f"{len(files)} files written" in capsys.readouterr().out
    ((folder, manifest),) = find_manifests(target, "train")
    assert folder == target / "train" and manifest == load_manifest(split)
    assert (target / "answers.json").read_bytes() == b"[]" and not (folder / ".hidden").exists()
    assert (open_index(folder, manifest, manifest.shards[1]) == open_index(split, manifest, manifest.shards[1])).all()
    assert main(["upload", str(corpus), str(target)]) == 0
    assert f"0 files written (0.0 MiB), {len(files)} were there already" in capsys.readouterr().out


def test_half_an_upload_is_no_split_and_goes_on(split: Path, target: Address, monkeypatch, capsys) -> None:
    original, left = uploading.upload, [3]

    def failing(path: Path, url: str) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise StoreUnreachable(f"{url}: writing could not be had")
        original(path, url)

    monkeypatch.setattr(uploading, "upload", failing)
    monkeypatch.setattr(uploading, "FILES_AT_A_TIME", 1)
    assert main(["upload", str(split), str(target)]) == 2
    assert "error: s3://" in capsys.readouterr().err
    with pytest.raises(ManifestError, match="tar files without a manifest.json"):
        find_manifests(target, "train")
    left[0] = 1000
    assert main(["upload", str(split), str(target)]) == 0
    assert "3 were there already" in capsys.readouterr().out
    assert len(find_manifests(target, "train")) == 1


def test_equal_size_is_not_equal_content(split: Path, target: Address, tmp_path: Path) -> None:
    plan = plan_upload(split, target)
    other = bytearray((split / "00000.tar").read_bytes())
    other[600] ^= 1
    (tmp_path / "other").write_bytes(other)
    requests.upload(tmp_path / "other", (target / "00000.tar").url)
    done = upload_files(plan, overwrite=False)
    assert done.written == len(plan) and verify_uploads(plan) == []
    requests.upload(tmp_path / "other", (target / "00000.tar").url)
    (wrong,) = verify_uploads(plan)
    assert wrong.startswith(f"{target / '00000.tar'}: its SHA-256 is not that of")


def test_large_files_go_in_parts_and_are_known_again(split: Path, target: Address, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(requests, "PART_BYTES", 5 * 2**20)  # the least that S3 takes
    monkeypatch.setattr(uploading, "PART_BYTES", 5 * 2**20)
    (split / "notes.bin").write_bytes(bytes(range(256)) * 50_000)
    upload_files(plan_upload(split, target), overwrite=False)
    assert requests.details_of((target / "notes.bin").url)["ETag"].strip('"').endswith("-3")
    assert upload_files(plan_upload(split, target), overwrite=False).written == 0


def test_another_split_is_replaced_with_overwrite_only(split: Path, target: Address, tmp_path: Path) -> None:
    upload_files(plan_upload(split, target), overwrite=False)
    other = write_split(tmp_path / "other" / "train", records(8))
    with pytest.raises(PrepError, match="another split is there; give --overwrite"):
        upload_files(plan_upload(other, target), overwrite=False)
    assert load_manifest(target) == load_manifest(split)
    upload_files(plan_upload(other, target), overwrite=True)
    assert load_manifest(target) == load_manifest(other) and verify_uploads(plan_upload(other, target)) == []


def test_what_is_not_whole_or_not_prepared_is_not_uploaded(split: Path, target: Address, tmp_path: Path) -> None:
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(PrepError, match="nothing prepared here"):
        plan_upload(empty, target)
    with pytest.raises(PrepError, match="hf upload"):
        plan_upload(split, Address("hf://datasets/me/x"))
    (split / "00001.index.npy").unlink()
    with pytest.raises(ManifestError, match=r"00001.index.npy: named by the manifest but missing"):
        plan_upload(split, target)
    (split / "manifest.json").unlink()
    with pytest.raises(ManifestError, match=r"tar files without a manifest.json"):
        plan_upload(split, target)


def test_a_split_in_a_store_reads_as_on_a_disk(split: Path, target: Address) -> None:
    upload_files(plan_upload(split, target), overwrite=False)
    here, there = Corpus(split), Corpus(target)
    assert there.fingerprint == here.fingerprint
    there.read_ahead(range(len(there)))
    assert [there.read(row) for row in range(len(there))] == [here.read(row) for row in range(len(here))]
    assert [there.read_text(row) for row in (3, 0)] == [here.read_text(row) for row in (3, 0)]
    assert (there.first_rows() == here.first_rows()).all()


class TestOutputInAStore:
    """``--output s3://...`` of a verb."""

    def test_synth_writes_both_corpora_there_and_leaves_nothing_here(
        self, target: Address, tmp_path: Path, monkeypatch, capsys
    ) -> None:
        monkeypatch.chdir(tmp_path)
        sizes = ["--train", "6", "--dev", "2", "--test", "2", "--image-size", "32", "--workers", "1"]
        place = target / "drawn"
        assert main(["synth", *sizes, "--output", "data/drawn"]) == 0
        assert main(["synth", *sizes, "--output", str(place)]) == 0
        for name, split in (("drawn", "train"), ("drawn", "dev"), ("drawn_pairs", "train")):
            there = load_manifest(target / name / split)
            assert there.fingerprint() == load_manifest(tmp_path / "data" / name / split).fingerprint()
        assert f"{place}: " in capsys.readouterr().out
        assert not [path for path in (tmp_path / "data" / ".uploads").rglob("*") if path.is_file()]

    def test_a_split_that_is_there_is_refused_before_the_work(self, split: Path, target: Address, capsys) -> None:
        assert main(["upload", str(split.parent), str(target)]) == 0
        command = ["parquet", "--input", "missing.parquet", "--split", "train", "--output", str(target)]
        assert main(command) == 2
        assert "a split is there; give --overwrite" in capsys.readouterr().err

    def test_what_failed_to_arrive_is_kept_and_named(
        self, target: Address, tmp_path: Path, monkeypatch, capsys
    ) -> None:
        monkeypatch.chdir(tmp_path)
        sizes = "--train 4 --dev 2 --test 2 --image-size 32 --workers 1 --pair-share 0".split()
        command = ["synth", *sizes, "--output", str(target / "drawn")]
        with monkeypatch.context() as broken:
            broken.setattr(uploading, "_bring", refuse)
            assert main(command) == 2
        assert [path for path in (tmp_path / "data" / ".uploads").rglob("manifest.json")]
        capsys.readouterr()
        assert main(command) == 2
        advice = re.search("`python -m data_prep (.*?)`", capsys.readouterr().err).group(1)
        assert main(advice.split()) == 0 and load_manifest(target / "drawn" / "train").samples == 4
        assert main([*command, "--overwrite"]) == 0
        assert not [path for path in (tmp_path / "data" / ".uploads").rglob("manifest.json")]

    def test_tasks_of_an_array_do_not_upload(self, target: Address, capsys) -> None:
        command = ["urls", "--input", "missing.tsv", "--engine", "array", "--output", str(target)]
        assert main(command) == 2 and "then `python -m data_prep upload`" in capsys.readouterr().err

    @pytest.mark.parametrize("place", ["https://example.org/data", "hf://datasets/a/b"])
    def test_a_place_that_can_not_be_written_is_refused_first(self, place: str, tmp_path: Path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert main(["synth", "--train", "4", "--output", place]) == 2
        assert "cannot be written by this program" in capsys.readouterr().err and not (tmp_path / "data").exists()


def refuse(one: uploading.Upload) -> bool:
    raise PrepError(f"{one.target}: no")
