"""The same run by every launcher: torchrun, mpirun, and deepspeed where the port is in use."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.reporting.metrics import read_log
from tests.tiny_corpus import make_corpus

REPOSITORY = Path(__file__).resolve().parents[2]
OPTIONS = ["--recipe", "flm_tiny", "--train.steps", "2", "--train.log_every", "1", "--train.eval_every", "0"]
OPTIONS += ["--tracking.tensorboard", "false", "--tracking.report", "false", "--data.num_workers", "1"]
LAUNCHERS = {
    "torchrun": ["torchrun", "--standalone", "--nproc-per-node", "2"],
    "mpirun": ["mpirun", "-n", "2", sys.executable],
    "deepspeed": ["deepspeed", "--num_gpus", "2"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("data"), train=64, dev=8)


@pytest.mark.slow(30)
@pytest.mark.parametrize("name", list(LAUNCHERS))
def test_two_ranks_of_a_real_launcher(data: Path, tmp_path: Path, name: str) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    launcher = LAUNCHERS[name]
    if shutil.which(launcher[0], path=path) is None:
        pytest.skip(f"{launcher[0]} is not installed")
    script = [
        str(REPOSITORY / "pipeline" / "train.py"),
        *OPTIONS,
        "--data",
        str(data),
        "--output",
        str(tmp_path / "run"),
    ]
    with socket.socket() as held:
        with suppress(OSError):  # deepspeed's default; in use already is as good
            held.bind(("", 29500))
            held.listen()
        done = subprocess.run(
            [*launcher, *script],
            cwd=tmp_path,
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    records = read_log(tmp_path / "run" / "log.jsonl")
    assert [record["step"] for record in records if record["kind"] == "train"] == [1, 2]
    assert '"world_size": 2' in (tmp_path / "run" / "environment.json").read_text()
