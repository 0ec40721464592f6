"""Training in a real Slurm, undisturbed and disturbed in every way that ends an attempt."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from pipeline.reporting.sample_keys import read_sample_keys
from tests.cluster.course import OPTIONS, SAVE_EVERY, STEPS, Course, assert_same, attempts, losses
from tests.cluster.desk import SCRIPTS, Desk

pytestmark = [pytest.mark.slow(60), pytest.mark.timeout(1200)]


def test_sbatch_trains_on_two_nodes(undisturbed: Path) -> None:
    assert list(losses(undisturbed)) == list(range(1, STEPS + 1))
    environment = json.loads((undisturbed / "environment.json").read_text())
    assert environment["world_size"] == 2


@pytest.mark.slow(150)
def test_a_job_survives_what_ends_its_attempts(desk: Desk, python: Path, data: Path, undisturbed: Path) -> None:
    """One job, six attempts that end early; nobody submits it again."""
    course, cluster = Course(desk, python, data), desk.cluster
    course.submit("--train.step_timeout_minutes", "0.4")
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
        course.pace(5)
        cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=2")

    lost: list[str] = []
    disturb(3, lambda: cluster.run("scancel", "--signal=USR1", job))
    disturb(8, lambda: cluster.run("scontrol", "requeue", job))
    disturb(13, lambda: os.kill(course.rank(1), signal.SIGKILL))
    disturb(18, lambda: os.kill(course.rank(0), signal.SIGSTOP))
    disturb(24, lose_a_node)
    disturb(28, reach_the_limit)
    course.pace(0)
    try:
        assert cluster.wait_for(job) == "COMPLETED", desk.log(job)
    finally:
        cluster.start_node(lost[0])
    assert_same(course.run, undisturbed)
    assert cluster.job(job)["Restarts"] == "6"
    began = [record["step"] for record in attempts(course.run, "begin")]
    assert all(began[stop + 1] >= reached[stop] for stop in (0, 1, 5)), "told to stop: nothing is lost"
    assert all(began[end + 1] >= reached[end] // SAVE_EVERY * SAVE_EVERY for end in (2, 3, 4)), (
        "else what came after the last save"
    )


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
    assert [record["world_size"] for record in attempts(course.run, "begin")] == [1, 2, 4]
    assert read_sample_keys(course.run) == read_sample_keys(undisturbed)
    expected = losses(undisturbed)
    assert losses(course.run) == pytest.approx(expected, rel=1e-4)  # sums in another order


def test_salloc_from_another_host(desk: Desk, python: Path, data: Path, undisturbed: Path) -> None:
    """Typed on a host that is none of the nodes, the ranks meet on the first node of their step."""
    if subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode:
        pytest.skip("no other host name: unshare --uts is not permitted here")
    site = desk.site(PYTHON=str(python), DATA=[str(data)])
    typed = f"hostname login; salloc --nodes=2 bash {SCRIPTS}/pretrain_flm.sh {' '.join(OPTIONS)}"
    variables = {"OPENFLM_SITE": str(site), "TEST_FOLDER": str(desk.folder)}
    desk.cluster.run("unshare", "--uts", "bash", "-c", typed, seconds=600, **variables)
    assert_same(desk.folder / "runs" / "flm_tiny", undisturbed)
