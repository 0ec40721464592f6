"""The rehearsal of many ranks at a small size: it counts what the real code asks, and its table says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.proof.start_rehearsal import main

RANKS, SHARDS = 5, 32


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("rehearsal") / "found.json"
    sizes = ["--ranks", str(RANKS), "--shards", str(SHARDS), "--rows", "40", "--micro-batch", "8", "--steps", "4"]
    assert main([*sizes, "--latency-ms", "0.01", "--output", str(output)]) == 0
    return output


def test_all_ranks_together_look_at_each_file_once(rehearsal: Path) -> None:
    found = json.loads(rehearsal.read_text())
    ranks = found["ranks"]
    shares = [2 * len(range(rank, SHARDS, RANKS)) for rank in range(RANKS)]
    assert [rank["shard_files"] for rank in ranks] == shares and found["alone"]["shard_files"] == sum(shares)
    assert ranks[0]["bytes"] - ranks[1]["bytes"] > 32 * 200  # of the manifest, by rank 0 alone
    assert len({rank["open"] for rank in ranks}) == 1 and len({rank["stat"] for rank in ranks[1:]}) == 1
    assert max(rank["bytes"] for rank in ranks[1:]) - min(rank["bytes"] for rank in ranks[1:]) < 1000


def test_shards_within_the_budget_are_opened_once(rehearsal: Path) -> None:
    reading = json.loads(rehearsal.read_text())["reading"]
    assert reading["full"]["samples"] == reading["blocks"]["samples"] == 32
    assert 0 < reading["full"]["opens_per_sample"] <= 2 and 0 < reading["blocks"]["opens_per_sample"] <= 2
