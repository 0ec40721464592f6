"""Ctrl-C at a terminal while training runs by each launcher: it is saved, said, and the shell learns of it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.checkpoint.files import newest_valid
from tests.terminal import CTRL_C, type_into
from tests.tiny_corpus import make_corpus

REPOSITORY = Path(__file__).resolve().parents[2]
OPTIONS = "--recipe flm_tiny --train.steps 100000 --train.log_every 1 --train.eval_every 0 --train.save_every 0 "
OPTIONS += "--data data --output run --data.num_workers 1 --tracking.tensorboard false --tracking.report false"
PATIENT = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "240"}  # torchrun kills after 30 s, which a busy machine may need
LAUNCHERS = {  # exit codes as the launchers pass them on: docs/launchers.md
    "python": ([sys.executable], 75),
    "deepspeed": (["deepspeed", "--num_gpus", "2"], 75),
    "torchrun": (["torchrun", "--standalone", "--nproc-per-node", "2"], 1),
    "mpirun": (["mpirun", "-n", "2", sys.executable], 75),
}


@pytest.mark.slow(30)
@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=pytest.mark.extended if one == "mpirun" else ()) for one in LAUNCHERS]
)
def test_ctrl_c_saves_says_so_and_the_prompt_waits(tmp_path: Path, name: str) -> None:
    words, code = LAUNCHERS[name]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if shutil.which(words[0], path=path) is None:
        pytest.skip(f"{words[0]} is not installed")
    make_corpus(tmp_path / "data", train=64, dev=8)
    command = f"{shlex.join([*words, str(REPOSITORY / 'pipeline' / 'train.py')])} {OPTIONS}; echo code $?"
    shown = type_into(command, [("held out after step 0", CTRL_C)], tmp_path, {"PATH": path, **PATIENT})
    saved, _ = newest_valid(tmp_path / "run")
    assert saved is not None, shown
    said = f"saved step {int(saved.name.removeprefix('step_'))}; the same command goes on"
    assert shown.count("SIGINT: stopping after this step") == 1 == shown.count(said), shown
    assert shown.rstrip().endswith(f"code {code}"), shown
    behind = shown.split(said)[1]
    if name == "python":
        assert behind == f"\ncode {code}\n"
    elif name != "torchrun":  # which shows where it was itself
        assert "Traceback" not in shown


@pytest.mark.slow
def test_before_the_first_step_it_leaves_nothing_behind(tmp_path: Path) -> None:
    """Here it comes once the run folder is there."""
    make_corpus(tmp_path / "data", train=64, dev=8)
    program = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom pipeline import train\n"
        "from pipeline.training import session\n"
        "def interrupted(*_):\n"
        "    assert Path('run/config.yaml').is_file()\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        f"session.open_records = interrupted\nsys.exit(train.main({OPTIONS.split()!r}))"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 75, done.stderr
    assert done.stderr == "error: told to stop by SIGINT before the first step: nothing to save\n"
    assert not (tmp_path / "run").exists()
