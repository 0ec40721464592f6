"""The same run by every launcher: plain python, torchrun, mpirun, deepspeed on one node and with a hostfile."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.distributed.launching import reserve_port
from pipeline.recording.run_log import read_log
from tests.forked_program import start_program
from tests.tiny_corpus import make_corpus

REPOSITORY = Path(__file__).resolve().parents[2]
OPTIONS = ["--recipe", "flm_tiny", "--train.steps", "2", "--train.log_every", "1", "--train.eval_every", "0"]
OPTIONS += ["--tracking.tensorboard", "false", "--tracking.report", "false", "--data.num_workers", "1"]
LAUNCHERS = {
    "torchrun": ["torchrun", "--standalone", "--nproc-per-node", "2"],
    "mpirun": ["mpirun", "-n", "2", sys.executable],
    "deepspeed": ["deepspeed", "--num_gpus", "2"],
    "hostfile": ["deepspeed", "--hostfile", "hosts", "--no_ssh"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("data"), train=64, dev=8)


@pytest.fixture(scope="module")
def expected(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float]]:
    """The losses of two ranks that no launcher started."""
    folder = tmp_path_factory.mktemp("expected")
    job = start_program(2, [*OPTIONS, "--data", data, "--output", folder / "run"], folder)
    assert job.finish() == [0, 0], job.output(0)
    return losses(folder / "run")


def losses(run: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read_log(run / "log.jsonl") if record["kind"] == "train"]


def finish_all(commands: list[list[str]], folder: Path, path: str) -> tuple[list[int], str]:
    """Exit codes of commands that run at once, and the end of what they print."""
    outputs = [folder / f"output{number}" for number in range(len(commands))]
    started = []
    for command, output in zip(commands, outputs):
        with output.open("w") as stream:
            environment = os.environ | {"PATH": path}
            started.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=stream, stderr=stream))
    try:
        codes = [one.wait(300) for one in started]
    finally:
        for one in started:
            one.kill()
    return codes, "".join(output.read_text()[-3000:] for output in outputs)


@pytest.mark.slow(30)
@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=pytest.mark.extended if one == "hostfile" else ()) for one in LAUNCHERS]
)
def test_two_ranks_of_a_real_launcher(data: Path, expected: list, tmp_path: Path, name: str) -> None:
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
    commands = [[*launcher, *script]]
    if name == "hostfile":  # started on every node by itself: DeepSpeed's way without ssh
        (tmp_path / "hosts").write_text("nodeone slots=1\nnodetwo slots=1\n")
        reserved, variables = reserve_port()
        reserved.close()
        meeting = ["--master_addr", variables["MASTER_ADDR"], "--master_port", variables["MASTER_PORT"]]
        commands = [[*launcher, "--node_rank", str(node), *meeting, *script] for node in (0, 1)]
    with socket.socket() as held:
        with suppress(OSError):  # deepspeed's default; in use already is as good
            held.bind(("", 29500))
            held.listen()
        codes, said = finish_all(commands, tmp_path, path)
    assert set(codes) == {0}, said
    assert losses(tmp_path / "run") == expected
    assert '"world_size": 2' in (tmp_path / "run" / "environment.json").read_text()
