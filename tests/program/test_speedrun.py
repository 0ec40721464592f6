"""The speedrun for real, small: four objectives are trained, stopped, continued, probed, compared."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import pytest

from benchmarks.speedrun import jobs
from pipeline.recording.run_log import read_log
from tests import forked_command
from tests.forked_command import Forked
from tests.tiny_corpus import make_corpus

ROWS = ["flm", "mlm_40", "ar", "prefixlm"]


def start(folder: Path, output: Path, *options: str) -> Forked:
    """The speedrun in a fork; its trainings and probes are forks, too."""
    words = ["--data", "data", "--output", "out", "--recipe", "quick.yaml", "--seeds", "0", "--only", *ROWS, *options]
    words += ["--jobs", "2", "--train-images", "60", "--test-images", "20", "--caption-images", "8"]

    def fork_jobs() -> None:
        jobs.subprocess = SimpleNamespace(**vars(subprocess) | {"Popen": fork_job})

    with output.open("w") as printed:
        command = [sys.executable, "-m", "benchmarks.speedrun", *words]
        return forked_command.start(command, folder, printed.fileno(), printed.fileno(), prepare=fork_jobs)


def fork_job(command: list[str], env: Mapping[str, str], stdout: IO, start_new_session: bool, **_: object) -> Forked:
    streams = stdout.fileno(), stdout.fileno()
    return forked_command.start(command, Path.cwd(), *streams, env, new_session=start_new_session)


@pytest.mark.extended
@pytest.mark.slow(90)
@pytest.mark.timeout(900)
def test_four_objectives_learn_and_are_compared(tmp_path: Path) -> None:
    """Completes after an interruption; each objective's held-out loss falls clearly; probes of all, same for all."""
    prepare(tmp_path)
    budget = ["--steps", "60", "--evaluations", "2"]
    first = start(tmp_path, tmp_path / "first", *budget)
    log, deadline = tmp_path / "out" / "runs" / "flm" / "seed_0" / "log.jsonl", time.monotonic() + 250
    try:
        while not any(record["kind"] == "train" for record in read_log(log)):
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        first.send_signal(signal.SIGINT)
        first.wait(timeout=150)
    error = (tmp_path / "first").read_text()
    assert first.returncode == 130 and error.splitlines()[-1].startswith("stopped by SIGINT"), error
    assert list((tmp_path / "out" / "runs" / "flm" / "seed_0" / "checkpoints").glob("step_*"))  # it saved

    second = start(tmp_path, tmp_path / "second", *budget)
    try:
        second.wait(timeout=450)
    finally:
        second.send_signal(signal.SIGTERM)  # if it is not through by now; it ends what it has started
    out = (tmp_path / "second").read_text()
    assert second.returncode == 0, out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [run["row"] for run in results["runs"]] == ROWS
    for run in results["runs"]:
        before, after = run["held_out"]["loss"]
        assert after < before - 1.0, f"{run['row']}: {before} to {after}"
        assert [point["step"] for point in run["points"]] == [
            0,
            run["points"][-1]["step"] // 2,
            run["points"][-1]["step"],
        ]
        assert {"vqa_accuracy", "matching_accuracy", "caption_exact_match"} <= set(run["points"][-1]["probes"])
        assert run["points"][-1]["seconds"] > run["points"][1]["seconds"] > 0
    tflop = {run["row"]: run["points"][-1]["tflop"] for run in results["runs"]}
    assert tflop["flm"] > 1.5 * tflop["mlm_40"] > 0  # two streams and a reconstructor
    blind = {point["probes"]["vqa_blind"] for run in results["runs"] for point in run["points"]}
    assert len(blind) == 1  # everyone was asked the same
    assert "| mlm_40 |" in (tmp_path / "out" / "table.md").read_text() and "written: out/table.md" in out


def prepare(folder: Path) -> None:
    """A synthetic corpus and a recipe that learns it within seconds."""
    make_corpus(folder / "data", train=400, dev=40)
    recipe = "base: flm_tiny\noptim: {learning_rate: 5.0e-3, micro_batch_size: 16}\ntrain: {log_every: 2}\n"
    (folder / "quick.yaml").write_text(recipe)
