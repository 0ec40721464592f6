"""Trainings in a test's cluster: the undisturbed one, and one at a pace at which it can be disturbed."""

from __future__ import annotations

import json
import time
from pathlib import Path

from pipeline.recording.run_log import read_log
from pipeline.recording.sample_keys import read_sample_keys
from tests.cluster.desk import Desk
from tests.cluster.warm_python import process_file

STEPS, SAVE_EVERY = 40, 5
OPTIONS = ["--recipe", "flm_tiny", "--train.steps", str(STEPS), "--train.save_every", str(SAVE_EVERY)]
OPTIONS += ["--train.log_every", "1", "--train.eval_every", "0", "--optim.batch_size", "8", "--optim.micro_batch_size"]
OPTIONS += ["2", "--tracking.tensorboard", "false", "--tracking.report", "false", "--tracking.sample_keys", "true"]
PATIENCE_SECONDS = 300  # the machine may be busy with other tests


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

    def submit(self, *more: str, options: tuple[str, ...] = ()) -> None:
        arguments = [*OPTIONS, *more]
        folder = str(self.desk.folder)
        self.job = self.desk.sbatch("pretrain_flm.sh", *arguments, site=self.site, options=options, TEST_FOLDER=folder)

    def pace(self, seconds: float) -> None:
        (self.desk.folder / "pace").write_text(str(seconds))

    def rank(self, rank: int) -> int:
        """Process id of a rank of the present attempt."""
        attempt = int(self.cluster.job(self.job)["Restarts"])
        return int(process_file(self.desk.folder, self.job, attempt, rank).read_text())

    def wait_for_step(self, step: int, seconds: float = PATIENCE_SECONDS) -> int:
        deadline = time.monotonic() + seconds
        while (reached := max(losses(self.run), default=0) if self.run.exists() else 0) < step:
            assert time.monotonic() < deadline, f"no step {step}: {self.desk.log(self.job)[-4000:]}"
            time.sleep(0.05)
        return reached

    def wait_for_attempt(self, attempt: int, seconds: float = PATIENCE_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while len(attempts(self.run, "begin")) <= attempt:
            assert time.monotonic() < deadline, f"no attempt {attempt}: {self.desk.log(self.job)[-4000:]}"
            time.sleep(0.1)
