"""Commands side by side: their order, what fails, and being told to stop."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks.speedrun.jobs import Job, Stopped, run_jobs
from pipeline.distributed.preempt import StopRequest


def python(*words: str) -> list[str]:
    return [sys.executable, "-c", *words]


def test_jobs_run_side_by_side_in_order_and_failures_end_nothing_else(tmp_path: Path) -> None:
    finished = []
    chain = [python("print('one')"), python("print('two')")]
    broken = [python("print('ill'); raise SystemExit(3)"), python("print('never')")]
    jobs = [
        Job("first", chain, tmp_path / "a" / "first.out", finish=lambda: finished.append("first")),
        Job("second", broken, tmp_path / "second.out", finish=lambda: finished.append("second")),
        Job("third", [python("import os; print(os.environ['OMP_NUM_THREADS'])")], tmp_path / "third.out"),
    ]
    failures = run_jobs(jobs, 2, 7, StopRequest())
    assert finished == ["first"] and (tmp_path / "a" / "first.out").read_text() == "one\ntwo\n"
    assert len(failures) == 1 and failures[0].startswith("second ended with exit code 3")
    assert str(tmp_path / "second.out") in failures[0] and failures[0].endswith("ill")
    assert (tmp_path / "third.out").read_text() == "7\n"


SLEEPER = """
import pathlib, signal, sys, time
def told(number, frame):
    pathlib.Path(sys.argv[1]).write_text("told")
    raise SystemExit(75)
signal.signal(signal.SIGTERM, told)
pathlib.Path(sys.argv[1]).write_text("ready")
time.sleep(60)
"""


def test_being_told_to_stop_is_passed_on(tmp_path: Path) -> None:
    note, stop = tmp_path / "note", StopRequest()

    def tell() -> None:
        while not note.exists() or note.read_text() != "ready":
            time.sleep(0.02)
        stop.signal_name = "SIGINT"

    threading.Thread(target=tell, daemon=True).start()
    jobs = [Job("a", [python(SLEEPER, str(note))], tmp_path / "a.out"), Job("b", [python("1")], tmp_path / "b.out")]
    with pytest.raises(Stopped) as stopped:
        run_jobs(jobs, 1, 1, stop)
    assert stopped.value.exit_code == 130 and note.read_text() == "told" and not (tmp_path / "b.out").exists()
