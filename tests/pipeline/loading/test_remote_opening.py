"""Opening a split of a store on several ranks: its manifest is read by one, each file is asked for by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_prep.manifest import ManifestError, find_manifests
from data_prep.stores.address import Address
from pipeline.distributed.places import Place
from pipeline.distributed.ranks import Agreement
from pipeline.loading.shared_opening import check_in_shares, found_by_main
from tests.forked_ranks import run_ranks
from tests.pipeline.data.test_reader import records, write_split
from tests.range_server import serving

WORLD, SHARDS = 2, 6


def opened_on(place: Place, address: str) -> Any:
    agreement = Agreement()
    try:
        found = found_by_main(lambda: find_manifests(Address(address), "train"), agreement)
        check_in_shares(found, agreement)
    except ManifestError as error:
        return str(error)
    return [(str(folder), manifest.fingerprint()) for folder, manifest in found]


@pytest.mark.slow
def test_a_store_is_asked_once_over_all_ranks(tmp_path: Path) -> None:
    split = write_split(tmp_path / "c" / "train", records(SHARDS), samples_per_shard=1)
    ((_, manifest),) = find_manifests(split, "train")
    with serving(tmp_path) as server:
        expected = [(f"{server.url}/c/train", manifest.fingerprint())]
        assert run_ranks(WORLD, opened_on, f"{server.url}/c") == [expected] * WORLD
        asked = [path.rpartition("/")[2] for _, path, _ in server.asked if not path.endswith("manifest.json")]
        names = [f"{number:05d}.{kind}" for number in range(SHARDS) for kind in ("tar", "index.npy")]
        assert sorted(asked) == sorted(names)
        whole = [
            1 for _, path, wanted in server.asked if path.endswith("train/manifest.json") and wanted != "bytes=0-0"
        ]
        assert len(whole) == 1
        (split / "00003.tar").unlink()
        (first, second) = run_ranks(WORLD, opened_on, f"{server.url}/c")
        assert first == second and "rank 1 on " in first and "00003.tar: named by the manifest but missing" in first
