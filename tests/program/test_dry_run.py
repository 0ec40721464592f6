"""The training program asked what it would do: which ranks speak, how all end, and that nothing is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forked_command import finish
from tests.forked_program import start_program
from tests.tiny_corpus import make_corpus

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = ["--recipe", "flm_tiny", "--train.eval_every", "8", "--train.eval_samples", "8", "--data.num_workers", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("data"), train=64, dev=8)


def program(*words: object, folder: Path) -> subprocess.CompletedProcess[str]:
    return finish([sys.executable, str(REPOSITORY / "pipeline/train.py"), *map(str, words)], folder)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


@pytest.mark.slow(25)
def test_steps_are_measured_and_nothing_is_left(data: Path, tmp_path: Path) -> None:
    """One rank, as JSON: stdout holds nothing else, and the operations are those that a run logs."""
    folder = tmp_path / "here"
    folder.mkdir()
    words = [*TINY, "--data", data, "--output", folder / "runs" / "one"]
    done = program(*words, "--dry-run-steps", 3, "--json", folder=folder)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["time"]["measured_steps"]) == 3
    assert (found["time"]["steps"], found["time"]["evaluations"], found["time"]["saves"]) == (20, 4, 2)
    assert found["time"]["loading_seconds_per_step"] > 0
    assert found["time"]["peak_bytes"] > 0.5 * found["memory"][1]["bytes_of_a_rank"]
    assert left_in(folder) == []
    trained = program(*words, "--train.steps", 1, "--train.log_every", 1, folder=folder)
    assert trained.returncode == 0, trained.stderr
    log = [json.loads(line) for line in (folder / "runs" / "one" / "log.jsonl").read_text().splitlines()]
    logged = next(one["gflop_per_sample"] for one in log if one["kind"] == "train")
    assert found["operations_per_sample"] / 1e9 == pytest.approx(logged, rel=0.2)  # of its own four captions
    again = program(*words, "--dry-run", "--json", folder=folder)
    resumed = json.loads(again.stdout)
    assert (resumed["run_folder"]["state"], resumed["run_folder"]["step"], again.returncode) == ("resumes", 1, 0)
    fewer = program(*words, "--train.steps", 1, "--dry-run", "--json", folder=folder)
    assert json.loads(fewer.stdout)["run_folder"]["state"] == "done"
    other = program(*words, "--model.text.width", 64, "--dry-run", folder=folder)
    assert other.returncode == 2
    assert "holds another run, at step 1" in other.stdout and "The run would be refused" in other.stdout


@pytest.mark.slow
def test_of_several_ranks_one_speaks(data: Path, tmp_path: Path) -> None:
    words = [*TINY, "--data", data, "--output", tmp_path / "run", "--deepspeed", "ds_configs/zero2.json"]
    job = start_program(2, [*words, "--dry-run"], tmp_path / "said")
    assert job.finish() == [0, 0], job.output(0)
    assert "* ZeRO 2" in job.output(0) and "Memory of a rank, 2 ranks" in job.output(0)
    assert job.output(1) == ""
    job = start_program(2, [*words, "--dry-run-steps", "3"], tmp_path / "measured")
    assert job.finish() == [0, 0], job.output(0) + job.output(1)
    assert "measured over 3 steps" in job.output(0) and "measured" not in job.output(1)
    assert left_in(tmp_path) == ["measured", "rank0.txt", "rank0.txt", "rank1.txt", "rank1.txt", "said"]


@pytest.mark.slow
def test_what_would_be_refused_ends_all_ranks(data: Path, tmp_path: Path) -> None:
    """A mistake that only the dry run sees, and one that the set-up meets itself."""
    beauty = [*TINY, "--data", data, "--output", tmp_path / "run", "--train.keep_best", "beauty"]
    nowhere = [*TINY, "--data", tmp_path / "nowhere", "--output", tmp_path / "run"]
    for number, words in enumerate((beauty, nowhere)):
        job = start_program(2, [*words, "--dry-run-steps", "3"], tmp_path / str(number))
        assert job.finish() == [2, 2], job.output(0) + job.output(1)
        assert "The run would be refused" in job.output(0)
        assert "Traceback" not in job.output(0) + job.output(1)
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob(".dry-run*"))


@pytest.mark.slow(30)
@pytest.mark.extended
@pytest.mark.parametrize("launcher", [["torchrun", "--standalone", "--nproc-per-node", "2"],
                                      ["deepspeed", "--num_gpus", "2"], ["mpirun", "-n", "2", sys.executable]],
                         ids=lambda words: words[0])  # fmt: skip
def test_by_a_real_launcher(data: Path, tmp_path: Path, launcher: list[str]) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    words = [
        str(REPOSITORY / "pipeline/train.py"),
        *TINY,
        "--data",
        str(data),
        "--output",
        "run",
        "--dry-run-steps",
        "3",
    ]
    environment = {**os.environ, "PATH": path, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = subprocess.run(
        [*launcher, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("measured over 3 steps") == 1
    assert left_in(tmp_path) == []
