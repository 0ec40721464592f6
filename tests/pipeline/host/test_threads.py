"""Threads of ranks: by the cores they share, by what the user or torchrun has set, and beside other programs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.distributed import host_cores
from pipeline.host.threads import BusyCores, Threads, _busy_seconds, _set_by_torchrun, share_cores, wait_briefly

HERE = socket.gethostname()
EVERYWHERE = (HERE, frozenset(range(8)), 0.0)


class FakeAgreement:
    """The ranks of a job: this one gathers what ``others`` give, hosts, cores and seconds."""

    def __init__(self, *others: tuple[str, frozenset[int], float]) -> None:
        self._others = others

    def gather(self, value: Any) -> list[Any]:
        return [value, *self._others]


@pytest.fixture
def threads(monkeypatch) -> list[int]:
    """The numbers of threads that were set; torch has 8 before, and the process 8 cores."""
    chosen: list[int] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(host_cores, "_quota_of_groups", lambda *_: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    return chosen


def test_ranks_of_a_host_share_the_cores_that_they_may_run_on(threads: list[int]) -> None:
    elsewhere, apart = ("other host", frozenset(range(8)), 0.0), (HERE, frozenset({8, 9}), 0.0)
    found = share_cores(FakeAgreement(EVERYWHERE, elsewhere, EVERYWHERE, apart, EVERYWHERE), environment={})
    assert threads == [2] == [found.number] and (found.cores, found.ranks) == (8, 4)
    assert found.lines == ["threads: 2 per rank, 8 cores for 4 ranks on this host; OMP_NUM_THREADS sets another number"]


@pytest.mark.parametrize("environment", [{"OMP_NUM_THREADS": "8"}, {"MKL_NUM_THREADS": "3"}])
def test_a_number_that_was_chosen_stands(threads: list[int], environment: dict[str, str]) -> None:
    found = share_cores(FakeAgreement(EVERYWHERE), environment=environment)
    assert threads == [] and found.lines[0].endswith(f"as {next(iter(environment))} says")


def test_a_rank_with_cores_of_its_own_keeps_them_all(threads: list[int]) -> None:
    others = (HERE, frozenset({8, 9}), 0.0), ("other host", frozenset(range(8)), 0.0)
    assert share_cores(FakeAgreement(*others), environment={}).number == 8 and threads == []


def test_more_ranks_than_cores_get_a_thread_each(threads: list[int]) -> None:
    assert share_cores(FakeAgreement(*[EVERYWHERE] * 20), environment={}).number == 1 and threads == [1]


def test_one_rank_with_a_quota_keeps_to_it(threads: list[int], monkeypatch) -> None:
    monkeypatch.setattr(host_cores, "_quota_of_groups", lambda *_: 3.0)
    found = share_cores(FakeAgreement(), environment={})
    assert threads == [3] and found.lines[0].startswith("threads: 3 per rank, 3 cores for 1 rank on this host")


def test_loader_processes_get_their_cores(threads: list[int]) -> None:
    assert share_cores(FakeAgreement(EVERYWHERE), num_workers=2, environment={}).number == 2


def test_the_one_thread_that_torchrun_sets_by_itself_is_nobodys_choice(tmp_path: Path, threads, monkeypatch) -> None:
    (tmp_path / "environ").write_bytes(b"HOME=/root\0PATH=/bin\0")
    environment = {"TORCHELASTIC_RUN_ID": "1", "OMP_NUM_THREADS": "1"}
    assert _set_by_torchrun(environment, tmp_path)
    assert not _set_by_torchrun({"OMP_NUM_THREADS": "1"}, tmp_path)
    monkeypatch.setattr("pipeline.host.threads._set_by_torchrun", lambda environment: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert share_cores(FakeAgreement(EVERYWHERE), environment=environment).number == 4 and threads == [4]
    (tmp_path / "environ").write_bytes(b"HOME=/root\0OMP_NUM_THREADS=1\0")
    assert not _set_by_torchrun(environment, tmp_path)


def test_busy_cores_are_read_by_core_without_their_idle_time(tmp_path: Path) -> None:
    """Fields of proc(5): user nice system idle iowait irq softirq steal guest guest_nice, in ticks."""
    stat = tmp_path / "stat"
    stat.write_text("cpu  9 9 9 9 9 9 9 9 9 9\ncpu0 100 20 3 9000 500 4 5 6 7 8\ncpu1 1 1 1 1 1 1 1 1 1 1\nintr 5\n")
    tick = os.sysconf("SC_CLK_TCK")
    assert _busy_seconds(frozenset({0}), stat) == pytest.approx(138 / tick)
    assert _busy_seconds(frozenset({0, 1}), stat) == pytest.approx(144 / tick)
    assert _busy_seconds(frozenset({0}), tmp_path / "none") is None


def test_what_others_compute_is_seen_and_what_is_ours_is_not(monkeypatch) -> None:
    """30 s of CPU time on these cores in 10 s, 4 s of them ours: 2.6 cores of others."""
    clock, busy = iter([100.0, 110.0]), iter([500.0, 530.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr("pipeline.host.threads._busy_seconds", lambda cores: next(busy))
    assert BusyCores().elsewhere(4.0) == pytest.approx(2.6)


@pytest.mark.parametrize(("elsewhere", "says"), [(0.5, False), (1.9, True), (None, False)])
def test_cores_that_others_keep_busy_are_said_with_what_to_do(elsewhere: float | None, says: bool) -> None:
    lines = Threads(2, 2, 1, None, elsewhere).lines
    assert len(lines) == 1 + says
    if says:
        assert lines[1].startswith("load: other programs keep 1.9 of these 2 cores busy")
        assert lines[1].endswith("OMP_NUM_THREADS=1")


@pytest.mark.parametrize(
    ("set_by_user", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_threads_that_wait_sleep_soon_unless_the_user_has_said_how(set_by_user: dict, expected: str | None) -> None:
    environment = dict(set_by_user)
    wait_briefly(environment)
    assert environment.get("GOMP_SPINCOUNT") == expected


@pytest.mark.slow
def test_openmp_learns_of_it_from_this_process() -> None:
    """libgomp reads its environment when torch loads it: OMP_DISPLAY_ENV makes it say what it has read."""
    program = "import os\nfrom pipeline.host.threads import wait_briefly\nwait_briefly()\n"
    program += "os.environ['OMP_DISPLAY_ENV'] = 'verbose'\nimport torch\n"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert "GOMP_SPINCOUNT = '1000'" in done.stderr, done.stderr
