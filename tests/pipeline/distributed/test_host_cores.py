"""Cores of a process and of the ranks of a host: by affinity and quota, not by what the machine has."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.options import Config
from pipeline.distributed import host_cores
from pipeline.distributed.host_cores import share_cores, usable_cores
from pipeline.loading.open_data import loader_options

HERE = socket.gethostname()


def test_cores_that_the_process_may_not_use_do_not_count(monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 9})
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(host_cores, "_quota_of_groups", lambda *_: None)
    assert usable_cores() == 3
    config = Config()
    config.data.num_workers = 8
    assert loader_options(config, pin=False).num_workers == 3


@pytest.mark.parametrize(("quota", "expected"), [(None, 4), (2.5, 2), (0.5, 1), (64.0, 4)])
def test_a_quota_of_time_counts_as_so_many_cores(monkeypatch, quota: float | None, expected: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(host_cores, "_quota_of_groups", lambda *_: quota)
    assert usable_cores() == expected


def test_the_smallest_quota_of_the_groups_above_counts(tmp_path: Path) -> None:
    membership, root = tmp_path / "cgroup", tmp_path / "fs"
    folder = root / "job" / "step"
    folder.mkdir(parents=True)
    membership.write_text("0::/job/step\n")
    assert host_cores._quota_of_groups(membership, root) is None
    (folder / "cpu.max").write_text("max 100000\n")
    (root / "job" / "cpu.max").write_text("150000 100000\n")
    (root / "cpu.max").write_text("400000 100000\n")
    assert host_cores._quota_of_groups(membership, root) == 1.5
    membership.write_text("1:cpu:/job/step\n")  # the first version of control groups
    assert host_cores._quota_of_groups(membership, root) is None


class FakeAgreement:
    """The ranks of a job: what they gather first are ``others``, hosts and cores; then each says the same."""

    def __init__(self, *others: tuple[str, set[int]]) -> None:
        self._others = others

    def gather(self, value: Any) -> list[Any]:
        others, self._others = self._others, ()
        return [value, *others]


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
    everywhere, elsewhere, apart = (HERE, set(range(8))), ("other host", set(range(8))), (HERE, {8, 9})
    line = share_cores(FakeAgreement(everywhere, elsewhere, everywhere, apart, everywhere), {})
    assert threads == [2] and line.startswith("threads: 2 per rank instead of 8, as 4 ranks share the cores")
    assert "OMP_NUM_THREADS" in line


@pytest.mark.parametrize("environment", [{"OMP_NUM_THREADS": "8"}, {"MKL_NUM_THREADS": "3"}])
def test_a_number_that_was_chosen_stands(threads: list[int], environment: dict[str, str]) -> None:
    assert share_cores(FakeAgreement((HERE, set(range(8)))), environment) is None and threads == []


def test_a_rank_with_cores_of_its_own_keeps_them_all(threads: list[int]) -> None:
    assert share_cores(FakeAgreement((HERE, {8, 9}), ("other host", set(range(8)))), {}) is None and threads == []


def test_more_ranks_than_cores_get_a_thread_each(threads: list[int]) -> None:
    assert share_cores(FakeAgreement(*[(HERE, set(range(8)))] * 20), {}) is not None and threads == [1]


def test_one_rank_with_a_quota_keeps_to_it(threads: list[int], monkeypatch) -> None:
    monkeypatch.setattr(host_cores, "_quota_of_groups", lambda *_: 3.0)
    line = share_cores(FakeAgreement(), {})
    assert threads == [3] and line.startswith("threads: 3 per rank instead of 8, as 1 rank has the cores")
