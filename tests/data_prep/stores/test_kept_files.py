"""Files kept on the node: fetched once, never taken damaged, bounded, and in memory where no disk takes them."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import pytest

from data_prep.stores import kept_files
from data_prep.stores.kept_files import open_kept

CONTENT = b"index" * 100
HASH = hashlib.sha256(CONTENT).hexdigest()


class Source:
    """Counts how often it is asked."""

    def __init__(self, content: bytes = CONTENT) -> None:
        self.content, self.asked = content, 0

    def __call__(self) -> bytes:
        self.asked += 1
        return self.content


@pytest.fixture(autouse=True)
def room(monkeypatch) -> None:
    monkeypatch.setattr(kept_files, "SPARE_BYTES", 0)
    monkeypatch.setattr(kept_files, "_warned", [False])


def content_of(descriptor: int) -> bytes:
    with open(descriptor, "rb") as stream:
        return stream.read()


def kept() -> list[Path]:
    return sorted((kept_files.files_folder() / "kept").iterdir())


def test_fetched_once_for_all(tmp_path: Path) -> None:
    source = Source()
    assert [content_of(open_kept(HASH, source)) for _ in range(3)] == [CONTENT] * 3 and source.asked == 1
    assert [path.name for path in kept()] == [f"{HASH}.kept"]
    pid = os.fork()
    if pid == 0:
        os._exit(0 if content_of(open_kept(HASH, Source(b"other"))) == CONTENT else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_threads_that_want_the_same_fetch_it_once() -> None:
    source, begin = Source(), threading.Barrier(8)
    found: list[bytes] = []

    def want() -> None:
        begin.wait()
        found.append(content_of(open_kept(HASH, source)))

    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [CONTENT] * 8 and source.asked == 1


@pytest.mark.parametrize("damage", [b"", b"other", CONTENT[:-1] + b"X"])
def test_a_damaged_or_removed_file_is_fetched_again(damage: bytes) -> None:
    os.close(open_kept(HASH, Source()))
    (path,) = kept()
    path.write_bytes(damage)
    assert content_of(open_kept(HASH, Source())) == CONTENT == path.read_bytes()
    path.unlink()
    assert content_of(open_kept(HASH, Source())) == CONTENT == path.read_bytes()


def test_what_is_fetched_is_compared_with_its_hash() -> None:
    with pytest.raises(ValueError, match="SHA-256"):
        open_kept(HASH, Source(b"other"))
    assert kept() == []


def test_a_hash_that_is_none_names_no_file() -> None:
    assert content_of(open_kept("../../../escaped", Source())) == CONTENT
    assert not (kept_files.files_folder() / "kept").exists()


def test_the_longest_unused_go(monkeypatch) -> None:
    monkeypatch.setattr(kept_files, "KEPT_BYTES", 3 * 500)
    monkeypatch.setattr(kept_files, "_WRITTEN_PER_LOOK", 1)
    monkeypatch.setattr(kept_files, "_written", [0])
    contents = [bytes([number]) * 500 for number in range(5)]
    hashes = [hashlib.sha256(one).hexdigest() for one in contents]
    for number in range(3):
        os.close(open_kept(hashes[number], Source(contents[number])))
        os.utime(kept_files.files_folder() / "kept" / f"{hashes[number]}.kept", (number, number))
    os.close(open_kept(hashes[0], Source(b"not asked")))  # used just now
    for number in (3, 4):
        os.close(open_kept(hashes[number], Source(contents[number])))
    assert {path.stem for path in kept()} == {hashes[0], hashes[3], hashes[4]}


@pytest.mark.parametrize("trouble", ["full", "another's"])
def test_without_a_disk_it_is_held_in_memory_and_said_once(trouble: str, monkeypatch, capfd) -> None:
    if trouble == "full":
        monkeypatch.setattr(kept_files, "SPARE_BYTES", 2**60)
    else:
        kept_files.files_folder().chmod(0o777)
    source = Source()
    assert [content_of(open_kept(HASH, source)) for _ in range(2)] == [CONTENT] * 2 and source.asked == 2
    said = capfd.readouterr().err
    assert said.count("warning: ") == 1 and "held in memory by each process; let TMPDIR name a folder" in said
