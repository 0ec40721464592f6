"""What can't go on by itself in a real Slurm: one clear line, nothing lost, and no job that starts again for ever."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.checkpoint.saver import HEADER_BYTES
from tests.cluster.course import OPTIONS, Course, assert_same, attempts
from tests.cluster.desk import Desk

pytestmark = [pytest.mark.extended, pytest.mark.slow(60), pytest.mark.timeout(1200)]


def test_mistakes_end_a_job_by_one_line(desk: Desk, python: Path, data: Path, script: Callable) -> None:
    """Four jobs at once; the last one fails in the same way whenever it is started."""
    site = desk.site(PYTHON=str(python), DATA=[str(data)])
    crash = f'case "$*" in *pipeline.restart*) exec {python} "$@" ;; esac\necho "$SLURM_PROCID: a bug" >&2\nexit 1'
    crashing = desk.site("crashing.sh", PYTHON=str(script("python", crash)), DATA=[str(data)])
    common = {"TEST_FOLDER": str(desk.folder)}
    with socket.create_server(("", 0)) as held:
        port = held.getsockname()[1]
        in_use = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        jobs = {
            name: desk.sbatch("pretrain_flm.sh", *OPTIONS, "--output", desk.folder / name, *more, site=its, **variables)
            for name, its, more, variables in (
                ("data", site, ["--data", "/nowhere/data"], common),
                ("port", site, [], common | in_use),
                ("master", site, [], common | {"MASTER_ADDR": "no-such-host.invalid"}),
                ("crash", crashing, [], common),
            )
        }
        ends = {name: desk.cluster.wait_for(job) for name, job in jobs.items()}
    logs = {name: desk.log(job) for name, job in jobs.items()}
    assert set(ends.values()) == {"FAILED"}, logs
    for name, words in (
        ("data", "error: .*/nowhere/data: no such folder"),
        ("port", f"error: .*port {port} of .* is in use"),
        ("master", "error: .*MASTER_ADDR='no-such-host.invalid' is no host that this one knows"),
    ):
        found = desk.cluster.job(jobs[name])
        assert (found["Restarts"], found["ExitCode"]) == ("0", "2:0"), logs[name]
        assert 1 <= len(re.findall(words, logs[name])) <= 2, logs[name]  # where the nodes can't tell each other
    assert desk.cluster.job(jobs["crash"])["Restarts"] == "2", logs["crash"]
    assert "not started again: the same failure 3 times in a row" in logs["crash"]


@contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Callable[[int], None]]:
    """Mounts a disk of so many KiB; yields what gives it another size."""
    folder.mkdir()
    mount = lambda *options: subprocess.run(["mount", *options, folder], capture_output=True).returncode == 0  # noqa: E731
    if not mount("-t", "tmpfs", "-o", f"size={kib}k", "none"):
        pytest.skip("no small disk: mount is not permitted here")
    try:
        yield lambda kib: mount("-o", f"remount,size={kib}k")
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_loses_nothing(desk: Desk, python: Path, data: Path, undisturbed: Path) -> None:
    """Room for one checkpoint, one too few: the job ends, and goes on when mended."""
    saved = next((undisturbed / "checkpoints").iterdir())
    kib = sum(file.stat().st_size for file in saved.iterdir()) / 1024
    course = Course(desk, python, data)
    with small_disk(desk.folder / "runs", int(1.6 * kib) + HEADER_BYTES // 1024) as resize:
        course.pace(0)
        course.submit()
        assert desk.cluster.wait_for(course.job) == "FAILED", desk.log(course.job)
        log = desk.log(course.job)
        assert (desk.cluster.job(course.job)["Restarts"], desk.cluster.job(course.job)["ExitCode"]) == ("0", "2:0"), log
        assert re.search("ALARM: checkpoint step_00000010 was not written: it needs", log), log
        resize(100_000)
        course.submit()
        assert desk.cluster.wait_for(course.job) == "COMPLETED", desk.log(course.job)
        assert attempts(course.run, "begin")[-1]["step"] >= 5
        assert_same(course.run, undisturbed)
