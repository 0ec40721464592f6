"""A run that is killed by SIGKILL and resumed is the uninterrupted run (many times: benchmarks/proof/kill_test.py)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.proof.kill_test import run_cell, table
from benchmarks.proof.killed_launch import Launcher, kill_session, session_members
from benchmarks.proof.same_run import differences
from tests.forked_command import Forked, fork, warm
from tests.forked_program import start_program
from tests.tiny_corpus import make_corpus


class ForkingLauncher(Launcher):
    """As killable as the real launcher, which benchmarks/proof/kill_test.py uses, in a fifth of its time."""

    def _start(self, run: Path) -> Forked:
        warm()

        def launch() -> int:
            os.setsid()
            os.chdir(self._folder)
            arguments = [*self._script[1:], "--output", str(run)]
            return max(start_program(self._ranks, arguments, self._output(run).parent).finish(300))

        return Forked([], fork(launch))

    def _output(self, run: Path) -> Path:
        return run.with_name(run.name + "-out") / "rank0.txt"


@pytest.mark.slow(50)
def test_killed_run_is_the_uninterrupted_run(tmp_path: Path) -> None:
    """Invariant 2, with 2 ranks at ZeRO 3 in bf16: all processes killed in training and in a save."""
    make_corpus(tmp_path / "data", train=120, dev=24)
    aims = ["saving", "training"]
    result = run_cell("bf16-zero3", 2, 12, tmp_path, 0, aims, ForkingLauncher)
    assert result["differences"] == []
    assert result["kills"] == 2 and result["launches"] > 2 and result["runs"] >= 1
    whole = tmp_path / "bf16-zero3-whole"
    assert_differences_are_seen(whole, tmp_path)
    assert "| bf16-zero3 | 2 |" in table({"bf16-zero3": result})


def assert_differences_are_seen(whole: Path, folder: Path) -> None:
    """The comparison itself: one bit of one logged number, one key, one line too many."""
    for name, edit, words in (
        ("log.jsonl", lambda text: text.replace('"loss": ', '"loss": 1', 1), "log.jsonl at"),
        ("log.jsonl", lambda text: text + text.splitlines(keepends=True)[0], "log.jsonl at"),
        ("sample_keys-rank1.jsonl", lambda text: text.replace('"keys": [["', '"keys": [["x', 1), "samples of step 1 "),
    ):
        other = shutil.copytree(whole, folder / "other", dirs_exist_ok=True)
        (other / name).write_text(edit((whole / name).read_text()))
        (found,) = differences(whole, other)
        assert words in found
    other = shutil.copytree(whole, folder / "other", dirs_exist_ok=True)
    newest = sorted((other / "checkpoints").iterdir())[-1]
    shutil.rmtree(newest)
    assert [found.split(": ")[1] for found in differences(whole, other)][:2] == [
        "weights",
        "step of the last checkpoint",
    ]


def test_a_kill_takes_the_whole_session_and_nothing_else() -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    program = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
    leader = subprocess.Popen([sys.executable, "-c", program + "time.sleep(60)"], start_new_session=True)
    try:
        deadline = time.monotonic() + 10
        while len(session_members(leader.pid)) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert kill_session(leader) == 2
        assert session_members(leader.pid) == [] and bystander.poll() is None
    finally:
        kill_session(bystander)
