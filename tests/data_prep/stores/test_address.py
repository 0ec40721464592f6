"""Addresses behave as paths where prepared data is looked for."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from data_prep.stores.address import Address, data_path
from data_prep.stores.failures import StoreError


def test_parts_of_an_address() -> None:
    one = Address("S3://bucket/a/b/")
    assert str(one) == "s3://bucket/a/b" and one == Address("s3://bucket/a") / "b"
    assert (one.name, str(one.parent), str(one.parent.parent.parent)) == ("b", "s3://bucket/a", "s3://bucket")
    assert pickle.loads(pickle.dumps(one)) == one and hash(one) == hash(data_path("s3://bucket/a/b"))


@pytest.mark.parametrize("text", ["s3://", "://a", "s3:///", "filecache::s3://bucket/a", "s3://a::b"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(StoreError, match="no address of a store, expected one like s3://BUCKET/FOLDER"):
        Address(text)


def test_files_are_paths() -> None:
    assert data_path("file:///data/a%20b") == Path("/data/a b") and data_path("data/x") == Path("data/x")


def test_folders_of_a_store() -> None:
    files = pytest.importorskip("fsspec").filesystem("memory")
    files.pipe({"/found/a/train/manifest.json": b"1", "/found/b/dev/x": b"2", "/found/file": b"3"})
    root = Address("memory://found")
    try:
        assert [one.name for one in root.iterdir()] == ["a", "b", "file"]
        assert [str(one) for one in root.glob("*/train")] == ["memory://found/a/train"]
        assert [str(one) for one in root.glob("*/*/x")] == ["memory://found/b/dev/x"]
        assert root.is_dir() and not (root / "c").is_dir() and (root / "file").is_file() and not root.is_file()
        assert (root / "a").exists() and not (root / "c").exists() and (root / "file").read_bytes() == b"3"
        with pytest.raises(FileNotFoundError):
            (root / "c").read_bytes()
    finally:
        files.rm("/found", recursive=True)
