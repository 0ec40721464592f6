"""Training in a real Slurm, undisturbed and disturbed in every way that ends an attempt."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.reporting.metrics import read_log
from pipeline.reporting.sample_keys import read_sample_keys
from tests.cluster.conftest import Desk
from tests.cluster.slurm_cluster import Cluster
from tests.cluster.warm_python import process_file, warm_python
from tests.tiny_corpus import make_corpus

STEPS = 60
OPTIONS = ["--recipe", "flm_tiny", "--train.steps", str(STEPS), "--train.log_every", "1", "--train.save_every", "10"]
OPTIONS += ["--train.eval_every", "0", "--tracking.tensorboard", "false", "--tracking.report", "false"]
OPTIONS += ["--tracking.sample_keys", "true", "--train.collective_timeout_minutes", "0.1"]
pytestmark = pytest.mark.slow(60)


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


def losses(run: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_log(run / "log.jsonl") if record["kind"] == "train"}


def assert_same(run: Path, reference: Path) -> None:
    assert losses(run) == losses(reference)
    assert read_sample_keys(run) == read_sample_keys(reference)


def attempts(run: Path, event: str) -> list[dict]:
    lines = (run / "attempts.jsonl").read_text().splitlines()
    return [record for line in lines if (record := json.loads(line))["event"] == event]


class Course:
    """A job in the middle of its training, at a pace at which it can be disturbed."""

    def __init__(self, desk: Desk, python: Path, data: Path) -> None:
        self.desk, self.cluster, self.run = desk, desk.cluster, desk.folder / "runs" / "flm_tiny"
        self.site = desk.site(PYTHON=str(python), DATA=[str(data)])
        self.pace(0.1)

    def submit(self, *options: str, script: str = "pretrain_flm.sh") -> None:
        self.job = self.desk.sbatch(
            script, *OPTIONS, site=self.site, options=options, TEST_FOLDER=str(self.desk.folder)
        )

    def pace(self, seconds: float) -> None:
        (self.desk.folder / "pace").write_text(str(seconds))

    def rank(self, rank: int) -> int:
        """Process id of a rank of the present attempt."""
        attempt = int(self.cluster.job(self.job)["Restarts"])
        return int(process_file(self.desk.folder, self.job, attempt, rank).read_text())

    def wait_for_step(self, step: int, seconds: float = 90) -> int:
        deadline = time.monotonic() + seconds
        while (reached := max(losses(self.run), default=0) if self.run.exists() else 0) < step:
            assert time.monotonic() < deadline, f"no step {step}: {self.desk.log(self.job)[-4000:]}"
            time.sleep(0.05)
        return reached

    def wait_for_attempt(self, attempt: int, seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while len(attempts(self.run, "begin")) <= attempt:
            assert time.monotonic() < deadline, f"no attempt {attempt}: {self.desk.log(self.job)[-4000:]}"
            time.sleep(0.1)


def test_sbatch_trains_on_two_nodes(undisturbed: Path) -> None:
    assert list(losses(undisturbed)) == list(range(1, STEPS + 1))
    environment = json.loads((undisturbed / "environment.json").read_text())
    assert environment["world_size"] == 2


@pytest.mark.timeout(400)
def test_a_job_survives_what_ends_its_attempts(desk: Desk, python: Path, data: Path, undisturbed: Path) -> None:
    """One job, six attempts that end early; nobody submits it again."""
    course, cluster = Course(desk, python, data), desk.cluster
    course.submit()
    job = course.job
    reached = []

    def disturb(step: int, how) -> None:
        reached.append(course.wait_for_step(step))
        how()
        course.wait_for_attempt(len(reached))

    def lose_a_node() -> None:
        batch = cluster.job(job)["BatchHost"]
        nodes = cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).split()
        lost.append(next(node for node in nodes if node != batch))
        cluster.stop_node(lost[0])

    def reach_the_limit() -> None:
        course.pace(2)
        cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=2")

    lost: list[str] = []
    disturb(4, lambda: cluster.run("scancel", "--signal=USR1", job))
    disturb(12, lambda: cluster.run("scontrol", "requeue", job))
    disturb(22, lambda: os.kill(course.rank(1), signal.SIGKILL))
    disturb(32, lambda: os.kill(course.rank(0), signal.SIGSTOP))
    disturb(42, lose_a_node)
    disturb(47, reach_the_limit)
    course.pace(0)
    try:
        assert cluster.wait_for(job) == "COMPLETED", desk.log(job)
    finally:
        cluster.start_node(lost[0])
    assert_same(course.run, undisturbed)
    assert cluster.job(job)["Restarts"] == "6"
    began = [record["step"] for record in attempts(course.run, "begin")]
    assert all(began[stop + 1] >= reached[stop] for stop in (0, 1, 5)), "told to stop: nothing is lost"
    assert all(began[end + 1] >= reached[end] // 10 * 10 for end in (2, 3, 4)), "else what came after the last save"
