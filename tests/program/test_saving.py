"""Saving as the program does it: a disk that fails, the best checkpoint, resuming without the starting weights."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from pipeline.checkpoint.files import newest_valid
from pipeline.checkpoint.restore import read_state
from pipeline.recording.run_log import read_log
from tests.program.test_program import SHORT, finish, program, work  # noqa: F401 (a fixture)

OPTIONS = [*SHORT, "--data.num_workers", "0", "--train.steps", "4"]


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.slow
def test_a_disk_that_takes_no_large_files_leaves_the_run_alive(work: Path) -> None:  # noqa: F811
    """Files are limited to 300 kB by the system: every save fails in its thread; all steps are taken and logged."""
    options = [*OPTIONS, "--train.save_every", "1", "--train.eval_every", "0", "--output", "runs/limited"]
    done = finish(
        program(*options), work, prepare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("ALARM: checkpoint step_") == 4 and "File too large" in done.stderr
    records = read_log(work / "runs" / "limited" / "log.jsonl")
    assert [record["step"] for record in records if record["kind"] == "train"] == [1, 2, 3, 4]
    assert [record["step"] for record in records if record["kind"] == "alarm"] == [1, 2, 3, 4]
    assert checkpoints(work / "runs" / "limited") == []
    again = finish(program(*options), work)
    assert again.returncode == 0 and newest_valid(work / "runs" / "limited")[0].name == "step_00000004", again.stderr


@pytest.mark.slow
def test_best_regular_and_newest_are_kept_and_starting_weights_are_not_needed_again(work: Path) -> None:  # noqa: F811
    run = work / "runs" / "kept"
    options = [*OPTIONS, "--train.keep_last", "1", "--train.keep_every", "2", "--train.keep_best", "flm_loss"]
    options += ["--train.save_every", "1", "--train.eval_every", "1", "--train.save_before_eval_seconds", "1e-6"]
    done = finish(program(*options, "--output", run), work)
    assert done.returncode == 0, done.stderr
    records = read_log(run / "log.jsonl")
    losses = {r["step"]: r["flm_loss"] for r in records if r["kind"] == "eval" and r["step"]}
    best = min(losses, key=losses.get)
    noted = json.loads((run / "checkpoints" / "best.json").read_text())
    assert noted == {"metric": "flm_loss", "value": losses[best], "step": best}
    expected = {f"step_{step:08d}" for step in (best, 2, 4)}
    assert set(checkpoints(run)) == {*expected, "best.json"}
    assert [record["step"] for record in records if record["kind"] == "checkpoint"] == [1, 2, 3, 4]

    gone = ["--model.vision.pretrained", "./gone.safetensors", "--train.steps", "5"]
    done = finish(program(*options, *gone, "--output", run), work)
    assert done.returncode == 0, done.stderr
    state = read_state(newest_valid(run)[0])
    assert state.step == 5 and state.best["value"] <= losses[best] and state.eval_seconds > 0
    fresh = finish(program(*options, *gone, "--output", "runs/fresh"), work)
    assert fresh.returncode == 2 and "gone.safetensors: no such file" in fresh.stderr, fresh.stderr

    wrong = finish(program(*OPTIONS, "--train.keep_best", "flm_los", "--output", "runs/never"), work)
    assert wrong.returncode == 2 and "train.keep_best: found 'flm_los', expected one of loss, flm_loss" in wrong.stderr
