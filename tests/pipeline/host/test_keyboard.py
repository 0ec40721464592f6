"""Ctrl-C and Ctrl-Z at a terminal on which a launcher runs that dies of Ctrl-C."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from tests.terminal import CTRL_C, CTRL_Z, type_into

PYTHON = shlex.quote(sys.executable)
REPOSITORY = Path(__file__).resolve().parents[3]
LAUNCHER = """
import os, subprocess, sys
ranks = []
for rank in "01":
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
    ranks.append(subprocess.Popen([sys.executable, "-u", "rank.py"], env=os.environ | place))
sys.exit(max(rank.wait() for rank in ranks))
"""
RANK = """
import os, sys, time
from pipeline.distributed.preempt import StopRequest
from pipeline.host.keyboard import keep_launcher_from_keys
keep_launcher_from_keys()
stop = StopRequest().listen()
open("rank" + os.environ["RANK"], "w").close()
while not all(os.path.exists(name) for name in ("rank0", "rank1")):  # a key before a rank listens is another story
    time.sleep(0.01)
terminal = os.open("/dev/tty", os.O_RDWR)
while os.tcgetpgrp(terminal) == os.getpgrp():
    time.sleep(0.01)
os.write(1, b"ready\\n" if os.environ["RANK"] == "0" else b"")
while not stop.requested:
    time.sleep(0.01)
time.sleep(1)
os.write(1, b"saved\\n")
sys.exit(75)
"""
FIRST = "SIGINT: stopping after this step; Ctrl-C again ends it at once, without saving\n"
SECOND = "SIGINT again: ended without saving; the same command goes on\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    (tmp_path / "rank.py").write_text(RANK)
    return tmp_path


def show(folder: Path, command: str, keys: list[tuple[str, bytes]], job_control: bool = True) -> str:
    environment = {"PYTHONPATH": str(REPOSITORY)}
    shown = type_into(command, keys, folder, environment, job_control, seconds=60)
    return shown.replace("^C", "").replace("^Z", "")


@pytest.mark.slow
def test_ctrl_c_is_for_the_ranks_and_the_prompt_returns_after_them(folder: Path) -> None:
    shown = show(folder, f"{PYTHON} launcher.py; echo code $?", [("ready", CTRL_C)])
    assert shown == f"ready\n{FIRST}saved\nsaved\ncode 75\n"


@pytest.mark.slow
def test_a_second_ctrl_c_ends_all_ranks_at_once(folder: Path) -> None:
    keys = [("ready", CTRL_C), ("without saving", CTRL_C)]
    shown = show(folder, f"{PYTHON} launcher.py; echo code $?", keys)
    assert shown == f"ready\n{FIRST}{SECOND}code 130\n"


@pytest.mark.slow
def test_ctrl_z_stops_the_shells_job_and_fg_goes_on_with_it(folder: Path) -> None:
    command = f"{PYTHON} launcher.py; echo at the prompt; sleep 1; (sleep 2; echo in front) & fg %1; echo code $?"
    shown = show(folder, command, [("ready", CTRL_Z), ("in front", CTRL_C)])
    assert "Stopped" in shown and shown.index("Stopped") < shown.index("at the prompt")
    assert FIRST + "saved\nsaved\n" in shown and shown.endswith("code 75\n")


@pytest.mark.slow
def test_a_script_has_the_terminal_again_afterwards(folder: Path) -> None:
    command = f"{PYTHON} launcher.py; echo code $?; sleep 1; echo next; sleep 50; echo not interrupted"
    shown = show(folder, command, [("ready", CTRL_C), ("next", CTRL_C)], job_control=False)
    assert shown == f"ready\n{FIRST}saved\nsaved\ncode 75\nnext\n"
