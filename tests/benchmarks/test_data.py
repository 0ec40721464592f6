"""The benchmarks of opening and reading run, and read what they say they read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.cost import opening, reading
from benchmarks.cost.reading import SHUFFLES, jumps
from pipeline.data.order import SampleOrder


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
