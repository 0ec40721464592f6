"""The benchmarks of opening and reading run, and read what they say they read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchmarks.cost import opening, reading, staging
from benchmarks.cost.loading import train_tokenizer
from benchmarks.cost.reading import SHUFFLES, jumps
from pipeline.data.order import SampleOrder
from pipeline.data.shard_reader import open_corpora
from pipeline.staging import node_folder
from tests.pipeline.data.test_reader import records, write_split


@pytest.mark.slow
def test_opening_waits_for_the_first_batch_of_any_step(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(opening, "SAMPLES", 300)
    monkeypatch.setattr(opening, "CAPTIONS", 4)
    assert opening.make(tmp_path, num_shards=4) == 4 * 1200
    assert opening.make(tmp_path, num_shards=4) == 4 * 1200  # it stands there already
    found = opening.first_batch(tmp_path, step=1_000_000, workers=1)
    assert 0 < found["opening_s"] < found["opening_and_first_batch_s"] and found["rank_rss_mib"] > 50


@pytest.mark.slow
def test_reading_compares_the_same_samples(tmp_path: Path, capsys) -> None:
    output = tmp_path / "reading.json"
    sizes = ["--synthetic", "130", "--image-px", "32", "--image-size", "32", "--workers", "1", "--repeats", "1"]
    assert reading.main([*sizes, "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert set(result["rounds"][0]) == {"webdataset", "full", "blocks"} and result["rows"] == 130
    assert all(run["cpu_ms"] > 0 and run["samples_per_second"] > 0 for run in result["rounds"][0].values())
    assert "ratio to webdataset" in capsys.readouterr().out


def test_a_block_shuffle_reads_few_places(monkeypatch) -> None:
    found = {name: jumps(SampleOrder([reading.JUMP_ROWS], 0, **options)) for name, options in SHUFFLES.items()}
    assert found["blocks"]["distinct_blocks_per_window"] <= 33 < 1000 < found["full"]["distinct_blocks_per_window"]
    assert found["blocks"]["distinct_shards_per_1000"] < 66 < 600 < found["full"]["distinct_shards_per_1000"]
    assert found["sequential"]["median_rows_between_reads_in_a_shard"] == 1


@pytest.mark.slow
def test_staging_counts_what_goes_over_the_network(tmp_path: Path, monkeypatch) -> None:
    """Without copies each epoch reads every sample; with them at most one copy of each shard is added."""
    monkeypatch.setattr(node_folder, "SPARE_BYTES", 0)
    write_split(tmp_path / "data" / "a" / "train", records(128), samples_per_shard=32, corpus="a")
    (tmp_path / "disk").mkdir()
    arguments = staging.parse(["--workers", "0", "--image-size", "16", "--latency-ms", "0.01", "--shard-samples", "32"])
    tokenizer = train_tokenizer(open_corpora([tmp_path / "data"], "train"))
    size = sum(path.stat().st_size for path in (tmp_path / "data").rglob("0*")) / staging.MIB
    found, before = {}, os.open
    for room in (None, 1.0):
        with staging.Network(tmp_path / "data", arguments) as network:
            run = staging.one_run(tmp_path / "data", tmp_path / "disk", network, "full", room, tokenizer, arguments)
        found[room] = [epoch["network_mib"] for epoch in run]
        assert len(run) == staging.EPOCHS and all(epoch["samples_per_second"] > 0 for epoch in run)
    assert os.open is before
    assert 0 < found[None][0] < 1.1 * size and found[None][0] == pytest.approx(found[None][1], rel=0.05)
    assert 0 < sum(found[1.0]) <= sum(found[None]) + size
