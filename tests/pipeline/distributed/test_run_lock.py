"""The lock of a run folder: one holder, let go of by any death, wherever locks exist."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.distributed import run_lock
from pipeline.distributed.run_lock import lock_run

REPOSITORY = Path(__file__).resolve().parents[3]
PROGRAM = (
    "import sys; from pathlib import Path; from pipeline.distributed.run_lock import lock_run;"
    "held = lock_run(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
)


def start_holder(run: Path) -> subprocess.Popen[bytes]:
    """A process that holds the lock until its input ends."""
    command = [sys.executable, "-c", PROGRAM, run]
    return subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_a_second_training_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    first = start_holder(tmp_path)
    try:
        assert first.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=f"is being trained by process {first.pid} on .*another --output"):
            lock_run(tmp_path, wait_seconds=0)
    finally:
        first.kill()
        first.wait()
    os.close(lock_run(tmp_path, wait_seconds=0))


def test_waits_for_one_that_is_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = start_holder(tmp_path)

    def first_ends(seconds: float) -> None:
        first.stdin.close()
        first.wait()

    try:
        assert first.stdout.readline() == b"held\n"
        monkeypatch.setattr(run_lock, "time", SimpleNamespace(monotonic=lambda: 0.0, sleep=first_ends))
        os.close(lock_run(tmp_path, wait_seconds=20))
        assert first.poll() == 0
    finally:
        first.kill()
        first.wait()


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert lock_run(tmp_path) is None
    assert "start only one run here" in capfd.readouterr().err


def test_a_run_folder_that_can_not_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/nothing/run")):
        with pytest.raises(ValueError, match=f"--output {folder}: can't be written"):
            lock_run(folder)
