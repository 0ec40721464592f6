"""A run that stages its shards, is killed and goes on with other options computes what a run without staging does."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from pipeline.recording.run_log import read_log
from pipeline.recording.sample_keys import read_sample_keys
from pipeline.staging import node_folder
from tests.forked_program import Job, start_program
from tests.tiny_corpus import make_corpus

OPTIONS = ["--recipe", "flm_tiny", "--train.log_every", "1", "--train.eval_every", "0", "--train.save_every", "2"]
OPTIONS += ["--tracking.tensorboard", "false", "--tracking.report", "false", "--tracking.sample_keys", "true"]
OPTIONS += ["--data.num_workers", "1", "--data.prefetch", "1", "--optim.batch_size", "8"]
OPTIONS += ["--optim.schedule", "constant", "--optim.warmup_fraction", "0"]  # whatever the number of steps


def start(data: Path, run: Path, *more: object) -> Job:
    return start_program(1, [*OPTIONS, "--data", data, "--output", run, *more], run.parent / f"out {run.name}")


def computed(run: Path) -> tuple[list, dict]:
    """Losses and gradient norms by step, and the keys of each step's samples."""
    records = [record for record in read_log(run / "log.jsonl") if record["kind"] == "train"]
    return [(record["step"], record["loss"], record["grad_norm"]) for record in records], read_sample_keys(run)


@pytest.mark.extended
@pytest.mark.slow
def test_losses_and_samples_are_those_of_a_run_without_staging(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(node_folder, "SPARE_BYTES", 0)
    data, disk, run = make_corpus(tmp_path / "data", train=64, dev=8), tmp_path / "disk", tmp_path / "staged"
    disk.mkdir()
    plain = start(data, tmp_path / "plain", "--train.steps", "6")
    assert plain.finish(200) == [0], plain.output(0)

    job = start(data, run, "--train.steps", "1000", "--data.stage_dir", disk)
    job.wait_for_step(run, 3)
    os.kill(job.pids[0], signal.SIGKILL)
    job.finish()
    copies = [path for path in disk.rglob("*.tar") if path.parent.name == "ready"]
    assert copies and "staging: up to" in job.output(0)
    for path in copies:
        os.truncate(path, path.stat().st_size // 2)

    monkeypatch.setenv("NODE_DISK", str(disk))
    last = start(data, run, "--train.steps", "6", "--data.stage_dir", "${NODE_DISK}", "--data.stage_gib", "0.5")
    assert last.finish(200) == [0], last.output(0)
    assert computed(run) == computed(tmp_path / "plain")
