"""The loading benchmark runs, and says what is missing in one line."""

from __future__ import annotations

import json

from benchmarks.cost.loading import main


def test_benchmark_measures_stages_and_both_loops(tmp_path, capsys):
    """Invariant 10: figures come with the command and the machine."""
    output = tmp_path / "loading.json"
    sizes = ["--synthetic", "6", "--image-px", "64", "--image-size", "32", "--samples", "16", "--micro-batch", "4"]
    assert main([*sizes, "--workers", "1", "--repeats", "2", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert {"order", "read", "decode", "tokenise"} < set(result["stages_ms"]["fast"])
    pairs = result["loops"][0]["samples_per_second"]
    assert len(pairs) == 2 and all(min(pair.values()) > 0 for pair in pairs)
    assert (
        result["command"].startswith("python -m benchmarks.cost.loading --synthetic 6") and result["machine"]["cores"]
    )
    assert "exact / bare" in capsys.readouterr().out


def test_missing_data_is_one_line(tmp_path, capsys):
    """Invariant 9."""
    assert main(["--data", str(tmp_path / "nothing")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
