"""The same evaluation by every launcher: two ranks find what one finds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline.scoring.program import make_runs, options, results, start

REPOSITORY = Path(__file__).resolve().parents[2]
MODULE = ["-m", "pipeline.evaluate"]
LAUNCHERS = {
    "torchrun": ["torchrun", "--standalone", "--nproc-per-node", "2", *MODULE],
    "deepspeed by path": ["deepspeed", "--num_gpus", "2", str(REPOSITORY / "pipeline" / "evaluate.py")],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_runs(tmp_path_factory.mktemp("runs"))


@pytest.mark.slow(40)
@pytest.mark.parametrize("name", [pytest.param("torchrun", marks=pytest.mark.extended), "deepspeed by path"])
def test_two_ranks_of_a_real_launcher(runs: Path, tmp_path: Path, name: str) -> None:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
    }
    launcher = LAUNCHERS[name]
    if shutil.which(launcher[0], path=environment["PATH"]) is None:
        pytest.skip(f"{launcher[0]} is not installed")
    words = options(runs, "run", tmp_path / "two")
    if name == "torchrun":  # it takes --run for its own --run-path
        words = ["--run-folder" if word == "--run" else word for word in words]
    done = subprocess.run(
        [*launcher, *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.count('"flm_loss"') == 1, "rank 0 prints the values, once"
    job = start(1, runs, "run", tmp_path / "one")
    assert job.finish() == [0], job.output(0)
    assert results(tmp_path / "two") == results(tmp_path / "one")
    assert '"world_size": 2' in next((tmp_path / "two").glob("*/scorecard.json")).read_text()
