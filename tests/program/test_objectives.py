"""The baselines train through the real program and caption images (AR is PrefixLM without prefix)."""

from __future__ import annotations

import sys

import pytest

from pipeline.recording.run_log import read_log
from tests.program.test_program import REPOSITORY, SHORT, finish, losses, program
from tests.program.test_program import work as prepared  # noqa: F401  (a fixture)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlm", "prefixlm"])
def test_each_objective_learns_and_captions(prepared, tmp_path, name: str) -> None:  # noqa: F811
    run = tmp_path / "run"
    options = [
        "--objective.name",
        name,
        "--train.steps",
        "30",
        "--optim.learning_rate",
        "5e-3",
        "--train.eval_every",
        "0",
    ]
    if name == "prefixlm":
        options += ["--objective.negatives", "in_batch_hard", "--objective.negative_share", "0.5"]
    start = program(*SHORT, "--data", prepared / "data", "--output", run, *options)
    done = finish(start, tmp_path)
    assert done.returncode == 0, done.stderr
    assert ("negatives: out of 4 captions" in done.stdout) == (name == "prefixlm")
    if name == "prefixlm":
        assert all(line["itm_loss"] > 0 for line in read_log(run / "log.jsonl") if line["kind"] == "train")
        refused = finish([*start, "--train.steps", "31", "--optim.micro_batch_size", "8"], tmp_path)
        assert refused.returncode == 2 and "another optim.micro_batch_size 4 -> 8" in refused.stderr
    by_step = losses(run)
    first, last = (sum(by_step[step] for step in steps) / 5 for steps in (range(1, 6), range(26, 31)))
    assert last < first - 0.5
    command = [sys.executable, "-m", "pipeline.generate", "--run", run, "--data", prepared / "data", "--samples", "2"]
    done = finish(list(map(str, command)), REPOSITORY)
    assert done.returncode == 0 and "captions: 2" in done.stdout, done.stderr
    assert ("Mask-predict, 10 iterations, lengths " in done.stdout) == (name == "mlm")
