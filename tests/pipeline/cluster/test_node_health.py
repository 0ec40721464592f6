"""Nodes that should be kept out of a job are told from mistakes that no other node would change."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from pipeline.cluster import node_health
from pipeline.cluster.node_health import MIB, Report, judge
from pipeline.distributed import bandwidth
from pipeline.distributed.ranks import Agreement
from pipeline.health import main
from tests.forked_program import start_program
from tests.forked_ranks import run_ranks

HOST = socket.gethostname()


def told(reports: list[Report]) -> tuple[int, dict[str, list[str]], dict[str, list[str]]]:
    code = judge(reports)
    unfit, mend = (
        {one.node: getattr(one, name) for one in reports if getattr(one, name)} for name in ("unfit", "mend")
    )
    return code, unfit, mend


def test_healthy_nodes() -> None:
    assert told([Report("n1", ["H100"] * 8), Report("n2", ["H100"] * 8)]) == (0, {}, {})


def test_the_node_that_differs_is_unfit() -> None:
    nodes = [Report(f"n{number}", ["H100"] * 8, clock_seconds=0.01 * number) for number in range(4)]
    nodes[2].devices.pop()
    nodes[3].clock_seconds = -12.0
    assert told(nodes) == (
        75,
        {"n2": ["7 GPUs, others have 8"], "n3": ["its clock is -12 s apart from most; mend its NTP"]},
        {},
    )


def test_a_clock_of_rank_0_that_is_off_is_rank_0_s() -> None:
    nodes = [Report("n1", clock_seconds=0.0), *(Report(f"n{number}", clock_seconds=-30.0) for number in (2, 3))]
    code, unfit, _ = told(nodes)
    assert code == 75 and list(unfit) == ["n1"] and "+30 s apart" in unfit["n1"][0]


@pytest.mark.parametrize("missing_on", [(1,), (0, 1)])
def test_data_that_one_node_lacks_is_the_node_s_and_what_all_lack_is_a_mistake(
    tmp_path: Path, missing_on: tuple[int, ...]
) -> None:
    nodes = [Report("n1"), Report("n2")]
    for number, node in enumerate(nodes):
        node_health.check_data(node, tmp_path / "gone" if number in missing_on else tmp_path)
    code, unfit, mend = told(nodes)
    assert code == (75 if missing_on == (1,) else 2)
    assert list(unfit if code == 75 else mend) == [f"n{number + 1}" for number in missing_on]


def test_the_only_node_lacks_data(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["--data", str(tmp_path / "gone")]) == 2
    printed = capsys.readouterr()
    assert f"error: {HOST}: {tmp_path}/gone: no such folder here" in printed.err and "unfit" not in printed.out


def test_all_unfit_by_themselves_is_a_mistake_of_the_site() -> None:
    nodes = [Report("n1"), Report("n2")]
    for node in nodes:
        node_health.check_memlock(node, 64 << 10, infiniband=True)
    code, unfit, mend = told(nodes)
    assert code == 2 and not unfit and "memlock is 0.0625 MiB in this job" in mend["n1"][0]


@pytest.mark.parametrize(
    ("limit", "infiniband", "fit"),
    [(resource.RLIM_INFINITY, True, True), (64 << 10, False, True), (1 << 30, True, True), (1 << 20, True, False)],
)
def test_memory_that_may_be_locked_matters_with_infiniband(limit: int, infiniband: bool, fit: bool) -> None:
    report = Report("n1")
    node_health.check_memlock(report, limit, infiniband)
    assert (report.unfit == []) == fit


def test_disks_are_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_health, "PROBE_BYTES", MIB)
    report = Report("n1")
    node_health.check_disk(report, tmp_path, "run", 0, is_shared=True)
    assert set(report.mib_per_second) == {"run write", "run read"} and min(report.mib_per_second.values()) > 0
    assert list(tmp_path.iterdir()) == [] and report.shared == []
    node_health.check_disk(report, tmp_path, "run", 1 << 62, is_shared=True)
    assert "GiB are free, expected" in report.shared[0]

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(node_health, "_write", full)
    node_health.check_disk(report, tmp_path, "shm", 0, is_shared=False)
    assert report.unfit == [f"{tmp_path}: No space left on device"]


def test_a_disk_that_gives_back_something_else_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_health, "PROBE_BYTES", MIB)
    monkeypatch.setattr(node_health, "_write", lambda path, content: path.write_bytes(content[:-1] + b"?"))
    report = Report("n1")
    node_health.check_disk(report, tmp_path, "run", 0, is_shared=True)
    assert report.shared in ([f"{tmp_path}: what is read is not what was written"], [])  # the last byte may be that one


def test_a_process_of_an_earlier_attempt_that_holds_a_gpu_is_found(tmp_path: Path) -> None:
    """It has survived its job, as under proctrack/linuxproc; other jobs of the user are none of ours."""
    own = {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "1"}
    for pid, job, attempt, device in (
        (10, "12", "0", "/dev/nvidia1"),
        (11, "12", "0", "/dev/null"),
        (12, "11", "0", "/dev/nvidia2"),
        (13, "12", "1", "/dev/nvidia3"),
        (14, None, None, "/dev/nvidia0"),
    ):
        (tmp_path / str(pid) / "fd").mkdir(parents=True)
        (tmp_path / str(pid) / "fd" / "5").symlink_to(device)
        (tmp_path / str(pid) / "maps").write_text("00400000-00452000 r-xp 00000000 08:02 173521 /usr/bin/python\n")
        pairs = {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": attempt} if job else {}
        (tmp_path / str(pid) / "environ").write_bytes("\0".join(f"{k}={v}" for k, v in pairs.items()).encode())
    report = Report("n1")
    node_health.check_leftovers(report, tmp_path, own)
    assert report.unfit == ["process 10 of an earlier attempt holds /dev/nvidia1; kill it"]


def test_segments_of_shared_memory_that_nobody_uses_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_health, "SHM", tmp_path)
    (tmp_path / "torch_1").write_bytes(b"x" * MIB)
    with open(tmp_path / "torch_2", "wb"):
        report = Report("n1")
        node_health.check_leftovers(report)
    assert report.leftovers == [f"1 unused files of 1 MiB in {tmp_path}, as torch_1"] and report.unfit == []


def test_one_node_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run, output = tmp_path / "not" / "made yet", tmp_path / "health.json"
    options = ["--run", str(run), "--data", str(tmp_path), "--min-free-gib", "0", "--output", str(output)]
    assert main(options) == 0
    line = capsys.readouterr().out
    assert line.startswith(f"{HOST}: ") and "run write" in line and "shm read" in line and "memlock" in line
    found = json.loads(output.read_text())
    assert found["exit_code"] == 0 and found["nodes"][0]["node"] == HOST and not run.exists()


def network(place) -> tuple[float, float]:
    if place.rank == 1:
        ahead = time.time
        bandwidth.time.time = lambda: ahead() + 100.0
    speed = bandwidth.all_reduce_bytes_per_second(1 << 16, torch.device("cpu"))
    return speed, bandwidth.clock_offset_seconds(Agreement())


def test_the_network_and_the_clocks_of_ranks() -> None:
    (speed, own), (_, offset) = run_ranks(2, network)
    assert speed > 0 and own == 0.0 and 50 < offset < 150


@pytest.mark.slow
def test_two_nodes_of_which_one_is_unfit(tmp_path: Path) -> None:
    """The whole program on two ranks; the second has another name and a clock that is wrong."""

    def prepare(rank: int) -> None:
        os.environ["SLURMD_NODENAME"] = f"n{rank}"
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if rank == 1:
            real = time.time
            bandwidth.time.time = lambda: real() - 60.0
            node_health.MIN_SHM_BYTES = 1 << 60

    job = start_program(2, ["--run", tmp_path, "--min-free-gib", "0"], tmp_path / "out", main, prepare)
    assert job.finish() == [75, 75], job.output(0) + job.output(1)
    lines = job.output(0).splitlines()
    assert [line.split(":")[0] for line in lines] == ["n0", "n1", "unfit n1", "unfit n1"][: len(lines)]
    assert "GiB are free" in lines[2] and job.output(1) == ""
