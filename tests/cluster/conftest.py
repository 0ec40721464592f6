"""A cluster of three nodes for each file of tests, a way to submit job scripts to it, and a training that went well."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.course import OPTIONS
from tests.cluster.desk import Desk
from tests.cluster.slurm_cluster import Cluster, slurm_cluster
from tests.cluster.warm_python import warm_python
from tests.tiny_corpus import make_corpus


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with slurm_cluster(num_nodes=3) as running:
        yield running


@pytest.fixture
def desk(cluster: Cluster, tmp_path: Path) -> Desk:
    return Desk(cluster, tmp_path)


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str, str], Path]:
    """Writes an executable bash script that stands for a program of the nodes."""

    def write(name: str, body: str) -> Path:
        path = tmp_path / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
        return path

    return write


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("data"), train=200, dev=8)


@pytest.fixture(scope="module")
def python(cluster: Cluster) -> Iterator[Path]:
    with warm_python(cluster.folder) as path:
        yield path


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `sbatch slurm/pretrain_flm.sh` as a user types it, by the interpreter of these tests."""
    desk = Desk(cluster, tmp_path_factory.mktemp("undisturbed"))
    site = desk.site(PYTHON=sys.executable, DATA=[str(data)])
    job = desk.sbatch("pretrain_flm.sh", *OPTIONS, site=site)
    assert cluster.wait_for(job) == "COMPLETED", desk.log(job)
    assert "Restarts" in cluster.job(job) and cluster.job(job)["Restarts"] == "0"
    return desk.folder / "runs" / "flm_tiny"
