"""Trained from a real S3 server by two ranks, killed and resumed: samples and losses are those of a local disk."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.__main__ import main as data_prep
from data_prep.stores import kept_files
from pipeline.recording.run_log import read_log
from pipeline.recording.sample_keys import read_sample_keys
from pipeline.staging import node_folder
from tests.forked_program import Job, start_program
from tests.s3_server import BUCKET, s3_variables
from tests.tiny_corpus import make_corpus

OPTIONS = ["--recipe", "flm_tiny", "--train.log_every", "1", "--train.eval_every", "0", "--train.save_every", "2"]
OPTIONS += ["--tracking.tensorboard", "false", "--tracking.report", "false", "--tracking.sample_keys", "true"]
OPTIONS += ["--data.num_workers", "1", "--data.prefetch", "1", "--optim.batch_size", "8", "--train.steps", "8"]
OPTIONS += ["--optim.micro_batch_size", "4", "--optim.schedule", "constant", "--optim.warmup_fraction", "0"]


@pytest.fixture
def stored(tmp_path: Path, monkeypatch) -> Iterator[Path]:
    """A corpus on this disk that lies in the bucket as well."""
    for module in (kept_files, node_folder):
        monkeypatch.setattr(module, "SPARE_BYTES", 0)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    with s3_variables() as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        data = make_corpus(tmp_path / "data", train=64, dev=8)
        assert data_prep(["upload", str(data), f"s3://{BUCKET}/data"]) == 0
        yield data


def start(world: int, data: Path | str, run: Path, *more: object) -> Job:
    return start_program(world, [*OPTIONS, "--data", data, "--output", run, *more], run.parent / f"out {run.name}")


def computed(run: Path) -> tuple[list, dict]:
    """Losses by step, and the keys of each step's samples."""
    records = [record for record in read_log(run / "log.jsonl") if record["kind"] == "train"]
    return [(record["step"], record["loss"]) for record in records], read_sample_keys(run)


@pytest.mark.slow(100)
@pytest.mark.timeout(400)
def test_two_ranks_compute_from_s3_what_they_compute_from_a_disk(stored: Path, tmp_path: Path) -> None:
    plain = start(2, stored, tmp_path / "plain")
    assert plain.finish(150) == [0, 0], plain.output(0)
    disk, run = tmp_path / "disk", tmp_path / "remote"
    disk.mkdir()
    cache = ["--data.stage_dir", disk, "--data.stage_gib", 0.1]

    job = start(2, f"s3://{BUCKET}/data", run, *cache, "--train.steps", "1000")
    job.wait_for_step(run, 3)
    for pid in job.pids:
        os.kill(pid, signal.SIGKILL)
    job.finish()

    last = start(2, f"s3://{BUCKET}/data", run, *cache)
    assert last.finish(150) == [0, 0], last.output(0)
    assert computed(run) == computed(tmp_path / "plain")
    copies = [path for path in disk.rglob("*") if path.is_file()]
    assert copies and sum(path.stat().st_size for path in copies) <= 0.1 * 2**30
