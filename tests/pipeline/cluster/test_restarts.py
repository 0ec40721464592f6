"""What follows from the end of an attempt: a restart, within a budget and never the same failure for ever."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.cluster import last_words, restarts
from pipeline.cluster.last_words import LastWordsFile, job_name, read_last_words
from pipeline.distributed.endings import Ending
from pipeline.restart import main

REPOSITORY = Path(__file__).resolve().parents[3]
KILLED = Ending(1, "n2", 75, "gone without a word: killed, out of memory, or its node is lost")
BUG = Ending(0, "n1", 1, "KeyError: 'x'")
PREEMPTED = Ending(0, "n1", 75, "told to stop by SIGTERM", stopped=True)


class Job:
    """A job that is started again as long as the program says so."""

    def __init__(self, run: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run, self._capsys, self._monkeypatch, self.attempt, self.name = run, capsys, monkeypatch, 0, "12"
        self.said, self.excluded = "", []
        times = itertools.count(1000)
        monkeypatch.setattr(last_words, "time", SimpleNamespace(time=lambda: next(times)))

    def ends(self, code: int, ending: Ending | None, saved: int | None = None, *options: str) -> int:
        """One attempt with what its ranks leave, and the exit code of what is decided about it."""
        self._monkeypatch.setenv("OPENFLM_ATTEMPT", str(self.attempt))
        words = LastWordsFile(self.run, lambda: saved, is_main=True)
        if saved is not None:
            folder = self.run / "checkpoints" / f"step_{saved:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "manifest.json").touch()
        if ending is not None:
            words.write(ending)
        return self.decide(code, *options)

    def decide(self, code: int, *options: str) -> int:
        arguments = ["--run", self.run, "--job", self.name, "--attempt", self.attempt, "--code", code]
        found = main([*map(str, arguments), "--nodes", "n1 n2", *options])
        printed = self._capsys.readouterr()
        self.said, self.excluded = printed.err, printed.out.splitlines()
        assert self.said.count("\n") == 1
        self.attempt += 1
        return found


@pytest.fixture
def job(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Job:
    (tmp_path / "run").mkdir()
    return Job(tmp_path / "run", capsys, monkeypatch)


@pytest.mark.parametrize(
    ("code", "ending", "expected"),
    [
        (75, PREEMPTED, 0),
        (75, KILLED, 0),
        (137, KILLED, 0),  # the launcher tells of the rank that was killed
        (143, None, 0),
        (139, None, 0),
        (1, BUG, 0),
        (2, None, 2),
        (2, KILLED, 2),
        (137, Ending(3, "n2", 2, "RUN: No space left on device"), 2),  # ranks that it ended were killed after that
        (9, Ending(0, "n1", 0, ""), 0),  # done, and then something failed: the next attempt finds it done
    ],
)
def test_the_code_and_the_last_words_say_what_comes_next(job: Job, code: int, ending: Ending, expected: int) -> None:
    assert job.ends(code, ending, saved=100) == expected
    assert ("not started again" in job.said) == bool(expected)


def test_what_happened_is_said_and_noted(job: Job) -> None:
    job.ends(137, KILLED, 100)
    assert job.said == (
        "attempt 0 of job 12 ended with exit code 137, rank 1 on n2: gone without a word: killed, out of memory, or "
        "its node is lost: started again; 1 of 50 restarts are used\n"
    )
    (noted,) = restarts.read_attempts(job.run)
    assert noted["ending"]["host"] == "n2" and noted["saved_step"] == 100 and noted["nodes"] == ["n1", "n2"]
    assert noted["requeued"] is True


def test_a_crash_loop_is_refused(job: Job) -> None:
    assert [job.ends(1, BUG, 100) for _ in range(3)] == [0, 0, 1]
    assert "the same failure 3 times in a row after step 100" in job.said


def test_the_same_error_at_another_step_is_no_crash_loop(job: Job) -> None:
    assert [job.ends(1, BUG, step) for step in (100, 100, 200, 200, 300)] == [0, 0, 0, 0, 0]


def test_ports_and_process_numbers_do_not_hide_a_crash_loop(job: Job) -> None:
    lost = [Ending(0, "n1", 75, f"Connection closed by peer [10.0.0.1]:{port}") for port in (5000, 60001, 417)]
    assert [job.ends(75, one) for one in lost] == [0, 0, 75]


def test_preemptions_between_do_not_hide_a_crash_loop(job: Job) -> None:
    ends = [BUG, PREEMPTED, BUG, PREEMPTED, BUG]
    assert [job.ends(one.code, one, 100) for one in ends] == [0, 0, 0, 0, 1]


def test_another_failure_between_breaks_the_row(job: Job) -> None:
    ends = [BUG, BUG, KILLED, BUG, BUG, BUG]
    assert [job.ends(one.code, one, 100) for one in ends] == [0, 0, 0, 0, 0, 1]


def test_failures_before_there_is_a_run_folder_are_counted(job: Job) -> None:
    job.run.rmdir()
    assert [job.ends(75, None) for _ in range(3)] == [0, 0, 75]
    assert "3 times in a row before the first checkpoint" in job.said


def test_a_mistake_before_the_run_began_leaves_no_folder(job: Job) -> None:
    job.run.rmdir()
    assert job.ends(2, None) == 2 and not job.run.exists()


def test_a_month_of_preemptions_is_free_as_long_as_steps_are_saved(job: Job) -> None:
    for step in range(8):
        assert job.ends(75, PREEMPTED, 10 + step, "--max-restarts", "2") == 0
    assert [job.ends(75, PREEMPTED, 17, "--max-restarts", "2") for _ in range(3)] == [0, 0, 75]
    assert "2 restarts are used up (--max-restarts)" in job.said


def test_the_budget_is_the_job_s_and_failures_count(job: Job) -> None:
    ends = [(BUG, 1), (BUG, 2), (KILLED, 3)]
    assert [job.ends(one.code, one, step, "--max-restarts", "2") for one, step in ends] == [0, 0, 75]
    job.name = "13"  # submitted again by hand
    assert job.ends(1, BUG, 4, "--max-restarts", "2") == 0


def test_an_attempt_that_ended_with_its_script_counts(job: Job) -> None:
    """The node of the script is lost: Slurm starts the job again, and nobody was there to note the end."""
    for attempt in range(2):
        restarts.begin(job.run, 100, ["n1", "n2"], {"SLURM_JOB_ID": "12", "OPENFLM_ATTEMPT": str(attempt)})
    job.attempt = 2
    assert job.ends(137, KILLED, 100, "--max-restarts", "2") == 137


def test_last_words_of_an_earlier_attempt_are_not_this_ones(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.ends(2, Ending(0, "n1", 2, "no such folder"), 100)
    assert job.decide(143) == 0 and "nobody said why" in job.said  # attempt 1 left none
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    job.attempt = 2
    job.ends(75, KILLED, 100)
    job.name, job.attempt = "13", 2  # of another job
    assert job.decide(143) == 0 and "nobody said why" in job.said
    job.name, job.attempt = "13", 0  # a new job, whose number of restarts is that of the old one
    assert job.decide(143) == 0 and "nobody said why" in job.said


def test_a_node_on_which_failures_begin_again_and_again_is_excluded_once(job: Job) -> None:
    assert job.ends(75, KILLED, 100) == 0 and job.excluded == []
    assert job.ends(75, KILLED, 100) == 0 and job.excluded == ["exclude n2"]
    assert job.ends(75, KILLED, 200) == 0 and job.excluded == []


@pytest.mark.parametrize(
    "ending",
    [BUG, PREEMPTED, None, KILLED._replace(names_cause=False), KILLED._replace(host="n9")],
    ids=["bug", "told to stop", "nobody said", "cause elsewhere", "no node of the job"],
)
def test_a_node_is_excluded_only_for_failures_of_the_machine_that_began_there(job: Job, ending: Ending) -> None:
    for step in range(4):
        job.ends(75, ending, step)
        assert job.excluded == []


def test_a_torn_line_is_left_out_and_hurts_no_other(job: Job) -> None:
    job.ends(1, BUG, 100)
    with open(job.run / restarts.NAME, "a") as stream:
        stream.write('{"event": "en')
    assert job.ends(1, BUG, 100) == 0 and job.ends(1, BUG, 100) == 1
    assert [one["attempt"] for one in restarts.read_attempts(job.run)] == [0, 1, 2]


def test_nothing_is_started_again_where_nobody_can_count(job: Job) -> None:
    (job.run / restarts.NAME).mkdir()
    assert job.ends(75, KILLED, 100) == 2 and "can't be counted" in job.said


def test_half_a_checkpoint_is_no_progress(job: Job) -> None:
    for step in (100, 200, 300):  # folders without a manifest
        (job.run / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
        found = job.ends(1, BUG)
    assert found == 1 and "before the first checkpoint" in job.said


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"rank": "x"}', "\x00"])
def test_a_damaged_file_of_last_words_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / last_words.NAME).write_text(text)
    assert read_last_words(tmp_path) is None


def test_the_name_of_a_job_of_an_array_is_its_own() -> None:
    """A restart by the bare number would start other jobs of the array again."""
    assert job_name({"SLURM_JOB_ID": "17", "SLURM_ARRAY_JOB_ID": "15", "SLURM_ARRAY_TASK_ID": "2"}) == "15_2"
    assert job_name({"SLURM_JOB_ID": "17"}) == "17" and job_name({}) is None


def test_the_program_needs_no_torch(tmp_path: Path) -> None:
    """It runs on the node of the script at every end, and torch takes many seconds to load."""
    program = (
        "import sys, pipeline.restart as restart\n"
        f"code = restart.main(['--run', {str(tmp_path)!r}, '--job', '1', '--attempt', '0', '--code', '75'])\n"
        "assert 'torch' not in sys.modules\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and "started again; 1 of 50 restarts are used" in done.stderr
    assert json.loads((tmp_path / restarts.NAME).read_text())["requeued"] is True
