"""What the job scripts do in a real Slurm around a program, for which a few lines of bash stand here."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.desk import REPOSITORY, SCRIPTS, Desk

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
ENVIRONMENT = 'env | sort >"$OUT/rank-$SLURM_PROCID"'


def variables(path: Path) -> dict[str, str]:
    return dict(line.partition("=")[::2] for line in path.read_text().splitlines())


@pytest.mark.extended
def test_ranks_get_what_the_dry_run_shows(desk: Desk, script: Callable) -> None:
    python = script("python", ENVIRONMENT)
    site = desk.site(PYTHON=str(python), RANKS_PER_NODE="2", CPUS_PER_RANK="2", NETWORK_INTERFACE="lo")
    shown = desk.cluster.run(SCRIPTS / "pretrain_flm.sh", "--dry-run", OPENFLM_SITE=str(site))
    assert f"OPENFLM_SITE={site} sbatch " in shown and "--signal=B:USR1@300" in shown and "--requeue" in shown
    left_over = {"RANK": "0", "WORLD_SIZE": "1", "SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SLURM_CPUS_PER_TASK": "7"}
    job = desk.sbatch("pretrain_flm.sh", site=site, options=("--time=5",), OUT=str(desk.folder), **left_over)
    assert desk.cluster.wait_for(job) == "COMPLETED", desk.log(job)
    assert "without Slurm's signal" in desk.log(job), "which would come at once, 300 s before the end of 300 s"
    lines = re.findall(r"^rank (\d): (.*)$", shown, re.M)
    assert len(lines) == 4
    for rank, line in lines:
        found = variables(desk.folder / f"rank-{rank}")
        for name, value in re.findall(r"(\w+)=(\S+)(?= |$)", line.partition(" OPENFLM_END_TIME=")[0]):
            assert found[name] == value.replace("-JOB/", f"-{job}/"), name
        assert 0 < int(found["OPENFLM_END_TIME"]) - time.time() <= 300
        assert found["SLURM_CPUS_PER_TASK"] == "2"
        assert not {"RANK", "WORLD_SIZE", "SLURM_CPU_BIND"} & set(found)
    assert not list((desk.folder / "logs").glob(".job-*")), "nothing is left behind"


@pytest.mark.extended
def test_evlgen_is_submitted_like_any_recipe(desk: Desk, script: Callable) -> None:
    site = desk.site(PYTHON=str(script("python", 'echo "$@" >"$OUT/rank-$SLURM_PROCID"')))
    job = desk.sbatch("pretrain_evlgen.sh", "--train.steps", "5", site=site, OUT=str(desk.folder))
    assert desk.cluster.wait_for(job) == "COMPLETED", desk.log(job)
    for rank in range(2):
        words = (desk.folder / f"rank-{rank}").read_text()
        assert "--recipe evlgen_opt2.7b --model.vision.pretrained eva_vit_g.pth --train.steps 5" in words
        assert f"--output {desk.folder}/runs/evlgen_opt2.7b" in words


@pytest.mark.parametrize(
    ("older", "arguments", "recipe"),
    [
        (False, (), "--recipe evlgen_opt2.7b --model.vision.pretrained eva_vit_g.pth"),
        (False, ("--recipe", "evlgen_small"), "--recipe evlgen_small"),
        (True, (), "--recipe evlgen_opt2.7b"),
    ],
    ids=["as it stands", "another recipe", "settings that are older than the script"],
)
def test_what_pretraining_of_evlgen_would_run(tmp_path: Path, older: bool, arguments: tuple, recipe: str) -> None:
    site, text = tmp_path / "site.sh", (SCRIPTS / "site.sh").read_text()
    site.write_text(re.sub(r"(?m)^PRETRAIN_EVLGEN=.*$", "", text) if older else text)
    command = ["bash", SCRIPTS / "pretrain_evlgen.sh", "--dry-run", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OPENFLM_SITE": str(site)})
    assert done.returncode == 0, done.stderr
    (shown,) = re.findall(r"^slurm: each of 2 ranks, .* runs: (.*)$", done.stderr, re.M)
    assert recipe in shown and shown.count("--recipe") == 1
    assert f"/runs/{recipe.split()[1]} " in shown + " "


@pytest.mark.extended
def test_a_node_without_python_is_left_out(desk: Desk, script: Callable) -> None:
    python = script("python", ENVIRONMENT)
    container = script("container", '[ "$SLURMD_NODENAME" != n2 ] || set -- "${@/%\\/python//python.gone}"\nexec "$@"')
    site = desk.site(PYTHON=str(python), CONTAINER=[str(container)])
    job = desk.sbatch("pretrain_flm.sh", site=site, OUT=str(desk.folder))
    assert desk.cluster.wait_for(job) == "COMPLETED", desk.log(job)
    found = desk.cluster.job(job)
    assert (found["Restarts"], found["ExcNodeList"], found["NodeList"]) == ("1", "n2", "n[1,3]")
    assert re.search(f"^unfit n2: no {python}.gone there; mend PYTHON", desk.log(job), re.M)


@pytest.mark.extended
def test_no_node_has_python(desk: Desk) -> None:
    job = desk.sbatch("pretrain_flm.sh", site=desk.site(PYTHON="/nowhere/python"))
    assert desk.cluster.wait_for(job) == "FAILED"
    assert (desk.cluster.job(job)["Restarts"], desk.cluster.job(job)["ExitCode"]) == ("0", "2:0")
    assert "error: no node of the job is fit" in desk.log(job)


@pytest.mark.extended
def test_the_first_failure_is_the_code_of_the_job(desk: Desk, script: Callable) -> None:
    """A mistake on one rank is not started again because Slurm then ends the others by a signal."""
    body = 'case "$*" in *pipeline.restart*) echo "$@" >"$OUT/asked"; exit 3;; esac\n'
    body += 'if [ "$SLURM_PROCID" = 1 ]; then exit 2; fi\ntrap "exit 75" TERM\nsleep 60 & wait'
    site = desk.site(PYTHON=str(script("python", body)))
    job = desk.sbatch("pretrain_flm.sh", site=site, OUT=str(desk.folder))
    assert desk.cluster.wait_for(job) == "FAILED"
    asked = (desk.folder / "asked").read_text()
    assert f"--run {desk.folder}/runs/flm_base_4m --job {job} --attempt 0 --code 2 --nodes n1 n2 " in asked
    assert desk.cluster.job(job)["ExitCode"] == "3:0", "the verdict's code is that of the job"


@pytest.mark.extended
def test_a_signal_to_the_batch_shell_reaches_every_rank(desk: Desk, script: Callable) -> None:
    body = 'trap "touch $OUT/told-$SLURM_PROCID; exit 0" USR1\ntouch "$OUT/up-$SLURM_PROCID"\nsleep 60 & wait'
    site = desk.site(PYTHON=str(script("python", body)), RANKS_PER_NODE="2")
    job = desk.sbatch("pretrain_flm.sh", site=site, OUT=str(desk.folder))
    desk.wait(lambda: len(list(desk.folder.glob("up-*"))) == 4)
    desk.cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert desk.cluster.wait_for(job) == "COMPLETED", desk.log(job)
    assert len(list(desk.folder.glob("told-*"))) == 4


STOPS = """case "$*" in *pipeline.restart*) echo "$@" >>"$OUT/asked"; exit 0 ;; esac
[ "$OPENFLM_ATTEMPT" = 0 ] || exit 0
trap "exit 75" TERM USR1
touch "$OUT/up-$SLURM_PROCID"
for second in {1..100}; do sleep 1 & wait $!; done"""


@pytest.mark.extended
@pytest.mark.parametrize(
    ("how", "state", "restarts", "words"),
    [
        (("scancel",), "CANCELLED", "0", "cancelled; submitted again, it goes on"),
        (("scontrol", "requeue"), "COMPLETED", "1", "Slurm has put the job back into its queue"),
        (("scancel", "--signal=TERM"), "COMPLETED", "1", ""),
        (("scontrol", "update", "TimeLimit=1"), "COMPLETED", "1", ""),
    ],
    ids=["cancelled", "requeued", "signalled", "time limit"],
)
def test_what_follows_when_slurm_ends_an_attempt(
    desk: Desk, script: Callable, how: tuple[str, ...], state: str, restarts: str, words: str
) -> None:
    """The program is told, the verdict is asked for once, and a job that was cancelled stays so."""
    site = desk.site(PYTHON=str(script("python", STOPS)))
    job = desk.sbatch("pretrain_flm.sh", site=site, OUT=str(desk.folder))
    desk.wait(lambda: len(list(desk.folder.glob("up-*"))) == 2)
    desk.cluster.run(*how, f"JobId={job}" if "update" in how else job)
    assert desk.cluster.wait_for(job) == state, desk.log(job)
    desk.wait(lambda: words in desk.log(job))
    assert desk.cluster.job(job)["Restarts"] == restarts, desk.log(job)
    asked = desk.folder / "asked"
    assert (asked.read_text().count("--code 75") if asked.exists() else 0) == int(restarts)


@pytest.mark.extended
def test_an_array_task_puts_itself_back_alone(desk: Desk, script: Callable) -> None:
    """Evaluations that are told to stop go on; the other tasks of the array are left alone."""
    body = 'echo >>"$OUT/$SLURM_ARRAY_TASK_ID"\n[ "$SLURM_ARRAY_TASK_ID$OPENFLM_ATTEMPT" != 10 ] || exit 75'
    site = desk.site(PYTHON=str(script("python", body)), TASKS=["one", "two", "three"])
    job = desk.sbatch("evaluate.sh", site=site, options=("--array=0-2",), OUT=str(desk.folder))
    desk.wait(lambda: not desk.cluster.run("squeue", "--noheader", "--jobs", job, check=False).strip())
    assert [len((desk.folder / str(task)).read_text()) for task in range(3)] == [1, 2, 1]


@pytest.mark.extended
def test_heterogeneous_jobs_are_refused(desk: Desk, script: Callable) -> None:
    site = desk.site(PYTHON=str(script("python", "exit 0")))
    job = desk.sbatch("pretrain_flm.sh", site=site, options=("--nodes=1", ":", "--nodes=1"))
    assert desk.cluster.wait_for(job) == "FAILED"
    assert "error: a heterogeneous job of 2 components" in desk.log(job)


@pytest.mark.extended
def test_what_sbatch_refuses_is_one_line(desk: Desk) -> None:
    for settings, words in (
        ({"PARTITION": "closed", "ACCOUNT": "ours"}, "Invalid account or account/partition combination"),
        ({"PARTITION": "nowhere"}, "Invalid partition name specified"),
        ({"NODES": "9"}, "Node count specification invalid"),
    ):
        said = desk.cluster.run(SCRIPTS / "pretrain_flm.sh", check=False, OPENFLM_SITE=str(desk.site(**settings)))
        assert re.fullmatch(rf"error: sbatch refused pretrain_flm: .*{words}.*; mend .*site.sh.*\n", said), said


@pytest.mark.extended
def test_an_array_beyond_the_limit_is_refused(desk: Desk) -> None:
    site = desk.site(TASKS=[f"task{number}" for number in range(21)])
    said = desk.cluster.run(SCRIPTS / "finetune.sh", check=False, OPENFLM_SITE=str(site))
    assert "MaxArraySize is 20, so that indices end at 19" in said


@pytest.mark.extended
def test_a_check_of_nodes_leaves_unfit_ones_out(desk: Desk, script: Callable) -> None:
    body = """[ "$1 $2 $3" = "-m pipeline.health --run" ] || exit 0
    echo "$SLURMD_NODENAME: looked at"; [ "$SLURMD_NODENAME" != n1 ] || { echo "unfit n1: slow disk"; exit 75; }"""
    site = desk.site(PYTHON=str(script("python", body)), HEALTH="yes")
    job = desk.sbatch("pretrain_flm.sh", site=site)
    assert desk.cluster.wait_for(job) == "COMPLETED", desk.log(job)
    assert desk.cluster.job(job)["NodeList"] == "n[2-3]"
    assert "n2: looked at" in desk.log(job) and "unfit n1: slow disk" in desk.log(job)


@pytest.mark.extended
def test_a_job_is_not_left_without_nodes(desk: Desk, script: Callable) -> None:
    """It needs two, is kept off one of three, a second is unfit: it ends and says so instead of waiting for ever."""
    body = """[ "$1 $2 $3" = "-m pipeline.health --run" ] || exit 0
    [ "$SLURMD_NODENAME" != n1 ] || { echo "unfit n1: slow disk"; exit 75; }"""
    site = desk.site(PYTHON=str(script("python", body)), HEALTH="yes")
    job = desk.sbatch("pretrain_flm.sh", site=site, options=("--exclude=n3",))
    assert desk.cluster.wait_for(job) == "FAILED", desk.log(job)
    assert (desk.cluster.job(job)["Restarts"], desk.cluster.job(job)["ExitCode"]) == ("0", "2:0")
    assert "without n1 partition main has 1 nodes left, the job needs 2" in desk.log(job)
    assert "error: too few nodes of the partition are left" in desk.log(job)


@pytest.mark.extended
def test_a_stage_that_fails_ends_the_pipeline_with_its_table(desk: Desk, script: Callable) -> None:
    """Submitted within a job that binds its processes; jobs that can't come any more are not left in the queue."""
    body = """case "$*" in
    *pipeline/train.py*) env >"$OUT/environment"; exit 2 ;;
    *--scores*) echo "$@" >"$OUT/scores" ;;
    *pipeline.restart*) exit 2 ;;
    esac"""
    site = desk.site(PYTHON=str(script("python", body)), TASKS=["one", "two"], PREPARE=["synth --train 8"])
    inner = f"export SLURM_CPU_BIND=quiet,mask_cpu:0x1 PMI_RANK=0; bash {shlex.quote(str(SCRIPTS / 'pipeline.sh'))}"
    wrap = ["sbatch", "--parsable", f"--output={desk.folder}/outer.out", "--cpus-per-task=3", "--wrap", inner]
    desk.cluster.run(*wrap, OPENFLM_SITE=str(site), OUT=str(desk.folder))
    desk.wait(lambda: (desk.folder / "scores").exists())
    assert (desk.folder / "scores").read_text().split()[-2:] == [f"{desk.folder}/runs/one", f"{desk.folder}/runs/two"]
    desk.wait(lambda: not desk.cluster.run("squeue", "--noheader").strip())
    numbers = re.findall(r"\d+", (desk.folder / "outer.out").read_text().partition("table")[0])
    states = [desk.cluster.job(number)["JobState"] for number in numbers]
    assert states == ["COMPLETED", "FAILED", "CANCELLED", "CANCELLED"], numbers
    found = variables(desk.folder / "environment")
    assert not {"SLURM_CPU_BIND", "PMI_RANK"} & set(found) and found["SLURM_CPUS_PER_TASK"] == "4"


@pytest.mark.extended
def test_an_environment_that_sbatch_did_not_export_reaches_the_ranks(desk: Desk, script: Callable) -> None:
    """--export=NAMES is meant for the batch shell; without a word to srun it would take PATH from the ranks as well."""
    site = desk.site(PYTHON=str(script("python", f"{ENVIRONMENT}; command -v srun")))
    job = desk.sbatch("prep_data.sh", "info", site=site, options=("--export=OPENFLM_SITE,OUT",), OUT=str(desk.folder))
    assert desk.cluster.wait_for(job) == "COMPLETED", desk.log(job)
    found = variables(desk.folder / "rank-0")
    assert found["OPENFLM_ATTEMPT"] == "0" and "/usr/bin" in found["PATH"] and "SLURM_EXPORT_ENV" not in found


@pytest.mark.extended
def test_tasks_of_an_array_share_the_parts_of_a_download(desk: Desk, script: Callable) -> None:
    """Each is told which it is, by Slurm's own variables; a verb that downloads nothing is refused."""
    body = """case "$*" in
    *urls*--help*) echo "--engine {processes,array}" ;;
    *--help*) echo "--output" ;;
    *) echo "$* $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" >"$OUT/task-$SLURM_ARRAY_TASK_ID" ;;
    esac"""
    site = desk.site(PYTHON=str(script("python", body)))
    options = ("--array=0-1",)
    job = desk.sbatch("prep_data.sh", "urls", "--input", "x", site=site, options=options, OUT=str(desk.folder))
    desk.wait(lambda: not desk.cluster.run("squeue", "--noheader").strip())
    said = [(desk.folder / f"task-{number}").read_text() for number in range(2)]
    assert said == [f"-m data_prep urls --input x --engine array {number}/2\n" for number in range(2)], job
    desk.sbatch("prep_data.sh", "synth", site=site, options=options, OUT=str(desk.folder))
    desk.wait(lambda: not desk.cluster.run("squeue", "--noheader").strip())
    logs = [path.read_text() for path in desk.folder.glob("prep_data-*.out")]
    assert sum("error: synth downloads nothing that an array could share" in log for log in logs) == 2


@pytest.mark.extended
def test_an_array_that_slurm_would_not_number_is_refused(desk: Desk) -> None:
    """MaxArraySize limits the index, whatever the number of tasks."""
    command = ["bash", SCRIPTS / "prep_data.sh", "--dry-run", "--array=0-99999999", "urls", "--input", "x"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OPENFLM_SITE": str(desk.site())})
    assert done.returncode == 2 and "MaxArraySize" in done.stderr
    command[3] = "--array=0-7"
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OPENFLM_SITE": str(desk.site())})
    assert done.returncode == 0 and "--array=0-7" in done.stderr and "urls --input x" in done.stderr


def test_a_rank_that_is_bound_to_few_cores_is_told(tmp_path: Path) -> None:
    """One core of four: `nproc` says what a rank may use, whatever Slurm has given."""
    core = min(os.sched_getaffinity(0))
    command = ["taskset", "-c", str(core), "bash", SCRIPTS / "rank.sh", tmp_path / "state", "4", "true"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"SLURMD_NODENAME": "n7"})
    assert done.stderr == f"slurm: n7: a rank may use 1 of its 4 CPUs: it is bound to {core}\n"


def test_scripts_are_clean() -> None:
    """shellcheck, with the files that they source."""
    try:
        done = subprocess.run(
            ["shellcheck", "--external-sources", *sorted(SCRIPTS.glob("*.sh")), REPOSITORY / "scripts" / "setup.sh"],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
        )
    except FileNotFoundError:
        pytest.skip("shellcheck is not installed: sudo apt-get install shellcheck")
    assert done.returncode == 0, done.stdout
