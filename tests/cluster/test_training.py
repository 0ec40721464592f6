"""Training in a real Slurm, undisturbed and disturbed in every way that ends an attempt."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.checkpoint.folders import newest_saved_step
from pipeline.recording.sample_keys import read_sample_keys
from tests.cluster.course import OPTIONS, STEPS, Course, assert_same, attempts, losses
from tests.cluster.desk import SCRIPTS, Desk

pytestmark = [pytest.mark.slow(60), pytest.mark.timeout(1200)]


def test_sbatch_trains_on_two_nodes(undisturbed: Path) -> None:
    assert list(losses(undisturbed)) == list(range(1, STEPS + 1))
    environment = json.loads((undisturbed / "environment.json").read_text())
    assert environment["world_size"] == 2


@pytest.mark.extended
@pytest.mark.slow(150)
def test_a_job_survives_what_ends_its_attempts(desk: Desk, python: Path, data: Path, undisturbed: Path) -> None:
    """One job, six attempts that end early; nobody submits it again."""
    course, cluster = Course(desk, python, data), desk.cluster
    course.submit("--train.step_timeout_minutes", "0.4")
    job = course.job
    lost: list[str] = []

    def disturb(step: int, how: Callable[[], object], told: bool) -> None:
        """At ``step`` or later; the next attempt begins there if the ranks were told to stop, else at the last save."""
        reached, begun = course.wait_for_step(step), len(attempts(course.run, "begin"))
        expected = reached if told else newest_saved_step(course.run)
        how()
        course.wait_for_attempt(begun)
        assert attempts(course.run, "begin")[begun]["step"] >= expected

    def lose_a_node() -> None:
        batch = cluster.job(job)["BatchHost"]
        nodes = cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).split()
        lost.append(next(node for node in nodes if node != batch))
        cluster.stop_node(lost[0])

    def reach_the_limit() -> None:
        course.pace(5)
        cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=2")

    disturb(3, lambda: cluster.run("scancel", "--signal=USR1", job), told=True)
    disturb(8, lambda: cluster.run("scontrol", "requeue", job), told=True)
    disturb(13, lambda: os.kill(course.rank(1), signal.SIGKILL), told=False)
    disturb(18, lambda: os.kill(course.rank(0), signal.SIGSTOP), told=False)
    disturb(24, lose_a_node, told=False)
    disturb(28, reach_the_limit, told=True)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    course.pace(0)
    try:
        assert cluster.wait_for(job) == "COMPLETED", desk.log(job)
    finally:
        cluster.start_node(lost[0])
    assert_same(course.run, undisturbed)
    assert int(cluster.job(job)["Restarts"]) >= 6


@pytest.mark.extended
def test_it_goes_on_with_other_numbers_of_ranks(desk: Desk, python: Path, data: Path, undisturbed: Path) -> None:
    """One rank, two on two nodes, four on two nodes: cancelled in between, the same submission finds its run."""
    course = Course(desk, python, data)
    for step, options, ranks in ((10, ("--nodes=1",), "1"), (20, (), "1"), (STEPS, (), "2")):
        desk.site(PYTHON=str(python), DATA=[str(data)], RANKS_PER_NODE=ranks)
        course.submit(options=options)
        if step < STEPS:
            reached = course.wait_for_step(step)
            desk.cluster.run("scancel", course.job)
            assert desk.cluster.wait_for(course.job) == "CANCELLED"
        else:
            course.pace(0)
            assert desk.cluster.wait_for(course.job) == "COMPLETED", desk.log(course.job)
            assert attempts(course.run, "begin")[-1]["step"] >= reached, "told to stop, it had saved"
    assert [len(record["hosts"]) for record in attempts(course.run, "begin")] == [1, 2, 4]
    assert read_sample_keys(course.run) == read_sample_keys(undisturbed)
    expected = losses(undisturbed)
    assert losses(course.run) == pytest.approx(expected, rel=1e-4)  # sums in another order


@pytest.mark.extended
def test_salloc_from_another_host(desk: Desk, python: Path, data: Path, undisturbed: Path) -> None:
    """Typed on a host that is none of the nodes, the ranks meet on the first node of their step."""
    if subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode:
        pytest.skip("no other host name: unshare --uts is not permitted here")
    site = desk.site(PYTHON=str(python), DATA=[str(data)])
    command = ["salloc", "--nodes=2", "bash", str(SCRIPTS / "pretrain_flm.sh"), *OPTIONS]
    typed = f"hostname login; {shlex.join(command)}"
    variables = {"OPENFLM_SITE": str(site), "TEST_FOLDER": str(desk.folder)}
    desk.cluster.run("unshare", "--uts", "bash", "-c", typed, seconds=600, **variables)
    assert_same(desk.folder / "runs" / "flm_tiny", undisturbed)
