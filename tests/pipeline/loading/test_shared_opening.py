"""Opening on many ranks: the file system is asked once over all of them, and all come to the same verdict."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from data_prep.manifest import ManifestError, find_manifests
from pipeline.distributed.places import Place
from pipeline.distributed.ranks import Agreement
from pipeline.loading.shared_opening import check_in_shares, found_by_main
from tests.forked_ranks import run_ranks
from tests.pipeline.data.test_reader import records, write_split

WORLD, SHARDS = 3, 20


def opened_on(place: Place, folder: Path) -> dict[str, Any]:
    """What one rank asks the file system for, and what it says of data that is whole, damaged, missing."""
    agreement, asked, read = Agreement(), [], []
    for name in ("lstat", "stat"):
        original = getattr(os, name)

        def noted(path, *arguments, original=original, **options):
            asked.append(str(path))
            return original(path, *arguments, **options)

        setattr(os, name, noted)
    sys.addaudithook(lambda event, arguments: read.append(str(arguments[0])) if event == "open" else None)

    def verdict(path: Path | str) -> Any:
        try:
            found = found_by_main(lambda: find_manifests(Path(path), "train"), agreement)
            check_in_shares(found, agreement)
        except ManifestError as error:
            return str(error)
        return [(str(split), manifest.fingerprint()) for split, manifest in found]

    found = {"whole": verdict(folder / "whole")}
    found["looked at"] = sorted(Path(path).name for path in asked if path.endswith((".tar", ".npy")))
    found["read"] = sum(name.endswith("manifest.json") for name in read)
    found |= {name: verdict(folder / name) for name in ("damaged", "nowhere")}
    if place.rank == 1:
        os.chdir("/")
    return found | {"not on rank 1": verdict("whole"), "rank": place.rank}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("shared")
    for name in ("whole", "damaged"):
        write_split(folder / name / "c" / "train", records(SHARDS), samples_per_shard=1)
    for number in (7, 5):  # of rank 1 and of rank 2
        (folder / "damaged" / "c" / "train" / f"{number:05d}.tar").unlink()
    before = os.getcwd()
    os.chdir(folder)
    try:
        return folder, run_ranks(WORLD, opened_on, folder)
    finally:
        os.chdir(before)


def test_each_file_is_looked_at_by_one_rank_and_the_manifest_read_by_one(ranks) -> None:
    folder, found = ranks
    expected = sorted(f"{number:05d}.{kind}" for number in range(SHARDS) for kind in ("tar", "index.npy"))
    assert sorted(name for rank in found for name in rank["looked at"]) == expected
    shares = [len(rank["looked at"]) for rank in found]
    assert max(shares) <= 2 * -(-SHARDS // WORLD)
    assert [rank["read"] for rank in found] == [1, 0, 0]
    ((split, manifest),) = find_manifests(folder / "whole", "train")
    assert [rank["whole"] for rank in found] == [[(str(split), manifest.fingerprint())]] * WORLD


def test_every_rank_names_the_same_file_and_the_rank_that_found_it(ranks) -> None:
    """The first in the order of the shards, as on one rank, where the rank is not named."""
    folder, found = ranks
    assert len({rank["damaged"] for rank in found}) == 1
    alone = Agreement()
    with pytest.raises(ManifestError) as caught:
        check_in_shares(find_manifests(folder / "damaged", "train"), alone)
    assert found[0]["damaged"] == f"rank 2 on {socket.gethostname()}: {caught.value}"
    assert "00005.tar: named by the manifest but missing" in str(caught.value)


def test_a_refusal_of_the_main_rank_is_that_of_all(ranks) -> None:
    _, found = ranks
    assert len({rank["nowhere"] for rank in found}) == 1 and "no such folder" in found[1]["nowhere"]


def test_a_rank_without_the_data_is_named(ranks) -> None:
    _, found = ranks
    assert len({rank["not on rank 1"] for rank in found}) == 1
    expected = (
        rf"rank 1 on {socket.gethostname()}: whole/c/train/manifest.json: cannot be read (No such file or directory)"
    )
    assert found[0]["not on rank 1"].startswith(expected)


def test_a_folder_that_may_not_be_listed_is_one_line(monkeypatch, tmp_path: Path) -> None:
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ManifestError, match=r"cannot be read \(Permission denied\)$"):
        found_by_main(lambda: find_manifests(tmp_path, "train"), Agreement())
