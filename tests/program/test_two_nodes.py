"""A run of two nodes: it trains, and whatever happens to one node ends both in bounded time."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest

from pipeline.distributed import watch
from pipeline.recording.run_log import read_log
from tests.forked_program import Job, start_program
from tests.tiny_corpus import make_corpus
from tests.two_nodes import Nodes, hide, two_nodes

OPTIONS = ["--recipe", "flm_tiny", "--train.log_every", "1", "--train.eval_every", "0", "--train.save_every", "0"]
OPTIONS += ["--tracking.tensorboard", "false", "--tracking.report", "false", "--data.num_workers", "1"]
HOST = socket.gethostname()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("data"), train=64, dev=8)


def start(nodes: Nodes, data: Path, folder: Path, steps: int, without_data: int | None = None) -> Job:
    def move(rank: int) -> None:
        nodes.enter(rank)
        if rank == without_data:
            hide(data)
        os.environ["LOCAL_RANK"] = "0"

    meeting = {"MASTER_ADDR": nodes.addresses[0], "MASTER_PORT": "29500"}
    arguments = [*OPTIONS, "--data", data, "--output", folder / "run", "--train.steps", str(steps)]
    return start_program(2, arguments, folder / "out", prepare=move, meeting=meeting)


@pytest.mark.slow
def test_two_nodes_train_together(data: Path, tmp_path: Path) -> None:
    """The host's name leads to the loopback on both nodes, as Debian sets it up; ranks use the network all the same."""
    with two_nodes() as nodes:
        job = start(nodes, data, tmp_path, steps=2)
        assert job.finish(200) == [0, 0], job.output(0) + job.output(1)
    assert [record["step"] for record in read_log(tmp_path / "run" / "log.jsonl") if record["kind"] == "train"] == [
        1,
        2,
    ]


@pytest.mark.slow
def test_a_node_without_the_data_says_so_and_ends_both(data: Path, tmp_path: Path) -> None:
    with two_nodes() as nodes:
        job = start(nodes, data, tmp_path, steps=2, without_data=1)
        assert job.finish(100) == [2, 2], job.output(0) + job.output(1)
    assert f"error: rank 1 on {HOST}: {data}: no split 'train' here" in job.output(1)
    assert f"error: rank 1 on {HOST}: {data}" in job.output(0) and "all ranks end with exit code 2" in job.output(0)


@pytest.mark.slow
def test_a_node_that_is_cut_off_is_noticed(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process is gone and its cable pulled, so that its connections never close: as when the power fails."""
    assert watch.SILENT_NODE_SECONDS + watch.GRACE_SECONDS < 60  # as it is set; here it is less, to be quicker
    monkeypatch.setattr(watch, "SILENT_NODE_SECONDS", 6)
    monkeypatch.setattr(watch, "GRACE_SECONDS", 1.0)
    with two_nodes() as nodes:
        job = start(nodes, data, tmp_path, steps=1_000_000)
        job.wait_for_step(tmp_path / "run", 2)
        nodes.cut()
        os.kill(job.pids[1], signal.SIGKILL)
        assert job.finish(100) == [75, -9], job.output(0) + job.output(1)
    assert f"error: rank 1 on {HOST}: gone without a word" in job.output(0)
