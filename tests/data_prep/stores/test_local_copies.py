"""Local copies of tables and of small files: whole, taken again while the original is the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep.__main__ import main
from data_prep.stores import local_copies
from data_prep.stores.address import Address
from data_prep.stores.failures import StoreError
from data_prep.stores.local_copies import fetch_small_files, fetch_tables
from data_prep.verbs import urls
from tests.range_server import RangeServer

TABLE = b"caption\turl\na dog\thttp://host/1.jpg\n"


@pytest.fixture
def files() -> Iterator[Any]:
    found = pytest.importorskip("fsspec").filesystem("memory")
    found.pipe({"/tables/part-0.tsv": TABLE, "/tables/part-1.tsv": TABLE, "/tables/_SUCCESS": b"", "/tables/x": b""})
    yield found
    found.rm("/tables", recursive=True)


@pytest.mark.parametrize("name, expected", [("tables", ["part-0.tsv", "part-1.tsv"]), ("tables/part-0.tsv", None)])
def test_tables_keep_their_names(files: Any, tmp_path: Path, name: str, expected: list[str] | None) -> None:
    found = fetch_tables(Address(f"memory://{name}"), tmp_path)
    assert found == tmp_path / name.rpartition("/")[2]
    if expected is None:
        assert found.read_bytes() == TABLE
    else:
        assert sorted(path.name for path in found.iterdir() if path.name[0] != ".") == expected


def test_a_copy_is_taken_again_while_the_original_is_the_same(files: Any, tmp_path: Path, monkeypatch) -> None:
    read, original = [], local_copies.read_range
    monkeypatch.setattr(local_copies, "read_range", lambda *asked: read.append(asked) or original(*asked))
    for _ in range(2):
        fetch_tables(Address("memory://tables/part-0.tsv"), tmp_path)
    assert len(read) == 1
    files.pipe("/tables/part-0.tsv", TABLE * 2)
    assert fetch_tables(Address("memory://tables/part-0.tsv"), tmp_path).read_bytes() == TABLE * 2


def test_what_is_no_table_is_said_in_one_line(files: Any, tmp_path: Path, capsys) -> None:
    with pytest.raises(StoreError, match="neither a table nor a folder of tables"):
        fetch_tables(Address("memory://nothing"), tmp_path)
    assert main(["urls", "--input", "memory://nothing/a.tsv", "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: memory://nothing/a.tsv: neither a table nor a folder")


@pytest.mark.slow
def test_the_verb_urls_reads_a_table_of_a_store(files: Any, tmp_path: Path, monkeypatch) -> None:
    taken: list[Any] = []
    monkeypatch.setattr(urls, "download_rows", lambda args, rows, request: taken.extend([list(rows), request]) or 0)
    options = ["--input", "memory://tables/part-0.tsv", "--output", str(tmp_path / "out")]
    assert main(["urls", *options]) == 0
    rows, request = taken
    assert [(row.url, list(row.captions)) for row in rows] == [("http://host/1.jpg", ["a dog"])]
    assert request["input"] == "part-0.tsv" and not (tmp_path / "out" / ".train.input").exists()


def test_small_files_come_by_their_content(server: RangeServer, content: bytes) -> None:
    folder = Address(f"{server.url}/bucket")
    found = fetch_small_files(folder, ["file", "empty", "absent"])
    assert {path.name: path.read_bytes() for path in found.iterdir()} == {"file": content, "empty": b""}
    (found / "file").write_bytes(b"damaged")
    assert (fetch_small_files(folder, ["file", "empty", "absent"]) / "file").read_bytes() == content
    (server.folder / "bucket" / "file").write_bytes(b"new")
    assert (fetch_small_files(folder, ["file", "empty", "absent"]) / "file").read_bytes() == b"new"
