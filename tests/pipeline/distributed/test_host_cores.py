"""Cores of a process and of the ranks of a host: by affinity and quota, not by what the machine has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.config.options import Config
from pipeline.distributed import host_cores
from pipeline.distributed.host_cores import usable_cores
from pipeline.loading.open_data import loader_options


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
