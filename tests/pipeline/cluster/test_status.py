"""What a run folder tells of a job, from files alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.cluster import heartbeats, restarts, status
from pipeline.cluster.last_words import LastWordsFile
from pipeline.cluster.status import StatusReader, slow_ranks
from pipeline.distributed.endings import Ending
from pipeline.status import main

REPOSITORY = Path(__file__).resolve().parents[3]
KILLED = Ending(1, "n2", 75, "gone without a word")


class Run:
    """A run folder whose files are written as the programs write them, and a clock."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now, self.beats, self.lines = folder, 0.0, 0, []
        folder.mkdir()
        (folder / "config.yaml").write_text("train: {steps: 1000}\n")
        restarts.begin(folder, 0, ["n1", "n2"], {"SLURM_JOB_ID": "12"})

    def train(self, first: int, last: int, seconds: float = 2.0, **more: Any) -> None:
        for step in range(first, last + 1, 10):
            line = {"kind": "train", "step": step, "time": 5000 + step * seconds, "loss": 3.5, "step_seconds": seconds}
            self.lines.append(line | {"samples_per_second": 64.0, "data_wait_share": 0.25} | more)
        self.write()

    def log(self, kind: str, step: int, **more: Any) -> None:
        self.lines.append({"kind": kind, "step": step, "time": 0.0, **more})
        self.write()

    def write(self) -> None:
        (self.folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in self.lines))

    def save(self, step: int) -> None:
        folder = self.folder / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()

    def end(self, ending: Ending, step: int = 0) -> None:
        LastWordsFile(self.folder, lambda: step, is_main=True).write(ending)

    def beat(self, **state: Any) -> None:
        self.beats += 1
        known = {"phase": "step", "doing": "computes", "step": 501, "behind": []}
        content = {"beat": self.beats, "every_seconds": 10.0, "pid": 7} | known | state
        (self.folder / heartbeats.NAME).write_text(json.dumps(content))

    def reader(self, beats: bool = False) -> StatusReader:
        def sleep(seconds: float) -> None:
            self.now += seconds
            if beats and self.now % 10 == 0:
                self.beat()

        return StatusReader(self.folder, lambda: self.now, sleep)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


def test_a_running_job(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    run.train(10, 500)
    run.save(400)
    run.log("checkpoint", 400, seconds=12.25)
    run.log("incident", 450, reason="loss not finite")
    run.beat()
    found = run.reader(beats=True).read()
    assert (found["state"], found["step"], found["steps"]) == ("running", 500, 1000)
    assert found["samples_per_second"] == 64 and found["step_seconds"] == 2 and found["eta_seconds"] == 500 * 2
    assert found["checkpoint"] == {"step": 400, "seconds": 12.25} and found["incidents"]["incident"] == 1
    assert found["hosts"] == ["n1", "n2"] and found["attempts"]["job"] == "12" and found["doing"]["doing"] == "computes"
    monkeypatch.setattr(status, "time", SimpleNamespace(monotonic=None, sleep=None))
    monkeypatch.setattr("pipeline.status.StatusReader", lambda path: run.reader(beats=True))
    assert main([str(run.folder)]) == 0
    text = capsys.readouterr().out
    for words in (
        "running",
        "500 of 1000, computes",
        "64 samples/s, 2 s a step",
        "25% of it waiting for data",
        "17 min",
    ):
        assert words in text
    assert "step 400, the last save took 12.2 s" in text and "1 incident; the last at step 450: loss not finite" in text


def test_a_beat_that_does_not_move_is_no_life_whatever_its_time(run: Run) -> None:
    run.train(10, 500)
    run.beat(behind=[{"rank": 1, "host": "n2", "silent": True, "doing": "computes", "seconds": 99, "where": ""}])
    found = run.reader().read()
    assert found["state"] == "not answering" and run.now > 2 * 10 and found["behind"][0]["rank"] == 1


def test_watched_it_is_judged_by_the_clock_of_the_reader(run: Run) -> None:
    """Nothing in the file is a time that counts: a clock that is off, and files seen late, do no harm."""
    run.beat(time=0)
    reader = run.reader(beats=True)
    states = [reader.read()["state"]]
    for seconds in (24, 24, 24):
        run.now += seconds
        run.beat(time=0)
        states.append(reader.read()["state"])
    run.now += 26
    assert states == ["running"] * 4 and reader.read()["state"] == "not answering"


def test_setting_up(run: Run) -> None:
    found = run.reader().read()
    assert found["state"] == "running" and "setting up" in found["why"] and found["step"] == 0


@pytest.mark.parametrize(
    ("ending", "saved", "state", "why"),
    [
        (Ending(0, "n1", 0, ""), 1000, "done", None),
        (Ending(0, "n1", 0, ""), 500, "incomplete", "it ended with 0 before its last step was saved; start it again"),
        (Ending(0, "n1", 75, "told to stop by SIGTERM", stopped=True), 500, "stopped", "told to stop by SIGTERM"),
        (KILLED, 500, "failed", "rank 1 on n2: gone without a word"),
    ],
)
def test_an_ended_job_is_judged_by_what_it_saved(
    run: Run, ending: Ending, saved: int, state: str, why: str | None
) -> None:
    """An exit code of 0 is no proof of completeness."""
    run.train(10, 500)
    run.save(saved)
    run.end(ending)
    found = run.reader().read()
    assert (found["state"], found["why"]) == (state, why)


def test_a_run_that_ended_early_is_done(run: Run) -> None:
    run.train(10, 500)
    run.log("early_stop", 500, reason="no better")
    run.end(Ending(0, "n1", 0, ""))
    assert run.reader().read()["state"] == "done"


def test_between_two_attempts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.end(KILLED)
    end, limits = restarts.End("12", 0, 75, ["n1", "n2"]), restarts.Limits(50, 3)
    assert restarts.conclude(run.folder, end, limits).requeue
    found = run.reader().read()
    assert (found["state"], found["why"]) == ("to be started again", "rank 1 on n2: gone without a word")
    LastWordsFile(run.folder, lambda: 0, is_main=True)  # the next attempt begins to set up
    assert run.reader().read()["why"] == "rank 1 on n2: gone without a word"
    restarts.begin(run.folder, 0, ["n1", "n3"], {"SLURM_JOB_ID": "12", "OPENFLM_ATTEMPT": "1"})
    found = run.reader().read()
    assert found["state"] == "running" and found["attempts"]["begun"] == 2 and found["hosts"] == ["n1", "n3"]


def line(rank: int, seconds: float, middle: float = 1.0) -> dict[str, float]:
    slow = {"slowest_forward_rank": rank, "slowest_forward_seconds": seconds, "forward_seconds": middle}
    data = {"slowest_data_wait_rank": 0, "slowest_data_wait_seconds": 0.1, "data_wait_seconds": 0.09}
    return {"step_seconds": 3.0, **slow, **data}


def test_a_rank_that_is_slow_most_of_the_time_is_named() -> None:
    (found,) = slow_ranks([line(1, 2.0), line(1, 2.2), line(1, 2.1), line(0, 2.0)], ["n1", "n2"])
    assert (found["rank"], found["host"], found["what"]) == (1, "n2", "computes")
    assert (found["seconds"], found["others_seconds"]) == (2.1, 1.0)


@pytest.mark.parametrize(
    "lines",
    [
        [line(1, 1.2)] * 4,  # some rank is always the slowest
        [line(1, 0.02, middle=0.01)] * 4,  # twice of nearly nothing
        [line(0, 2.0), line(1, 2.0)] * 2,  # now this one, now that one
        [{"step_seconds": 3.0}] * 4,  # one rank alone
        [],
    ],
)
def test_nobody_is_named_without_need(lines: list[dict[str, float]]) -> None:
    assert slow_ranks(lines, ["n1", "n2"]) == []


def test_a_night_between_two_attempts_is_not_in_the_time_left(run: Run) -> None:
    run.train(10, 400)
    for one in run.lines[30:]:
        one["time"] += 40_000
    run.write()
    assert run.reader().read()["eta_seconds"] < 600 * 2 * 10


def test_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: no run (neither log.jsonl nor attempts.jsonl in it)")


@pytest.mark.parametrize("name", ["log.jsonl", "attempts.jsonl", "heartbeat.json", "ending.json", "config.yaml"])
@pytest.mark.parametrize("content", [b"", b"[1]\n{}\n", b'{"event": "end"}\n', b"\xff\xfe", b"{" * 300])
def test_a_damaged_file_hides_no_more_than_itself(run: Run, name: str, content: bytes) -> None:
    run.train(10, 500)
    (run.folder / name).write_bytes(content)
    assert run.reader().read()["step"] in (0, 500)


def test_the_program_needs_no_torch(run: Run) -> None:
    """It is run on login nodes."""
    run.end(KILLED)
    program = (
        "import sys, pipeline.status as status\n"
        f"assert status.main([{str(run.folder)!r}, '--json']) == 0\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["state"] == "failed"
