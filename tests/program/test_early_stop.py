"""Training ends after train.patience evaluations without a better score, at the same step whatever killed it before."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint.files import newest_valid
from pipeline.checkpoint.restore import read_state
from pipeline.config.command_line import parse_command_line
from pipeline.distributed.places import Place
from pipeline.distributed.preempt import StopRequest
from pipeline.distributed.ranks import Agreement
from pipeline.training import loop
from pipeline.training.session import Ranks, resolve_ds_config, set_up
from tests import toy_task
from tests.forked_ranks import run_ranks
from tests.program.test_toy_task import pairs, records  # noqa: F401 (a fixture)

DISTANCES = {0: 1.0, 2: 5.0, 4: 4.0, 6: 4.0, 8: 4.5, 10: 3.0, 12: 6.0}  # lower is better, step 0 does not count


class Killed(Exception):
    """Stands for a kill: nothing is saved after it."""


def train(place: Place, folder: Path, data: Path, kill_at: int | None, *words: str) -> tuple[int | None, list[int]]:
    """Exit code (None: killed before step ``kill_at``), and the steps whose evaluation was computed."""
    os.chdir(folder)
    settings = ["--recipe", "flm_tiny", "--data", str(data / "synth_pairs"), "--output", "run", "--train.epochs", "4.8"]
    settings += ["--data.tokenizer", str(data / "tokenizer"), "--train.eval_every", "2", "--train.log_every", "1"]
    settings += ["--train.save_every", "2", "--train.async_save", "false", "--train.keep_best", "distance"]
    settings += ["--train.keep_last", "9", "--train.patience", "2", "--tracking.tensorboard", "false"]
    launch, device = parse_command_line([*settings, "--tracking.report", "false", *words]), torch.device("cpu")
    session = set_up(
        launch,
        resolve_ds_config(launch, place, device),
        toy_task.ToyTask(),
        Ranks(place, device, Agreement(), StopRequest().listen()),
    )
    evaluated, take_step = [], session.engine.step

    def evaluate(*_) -> dict[str, float]:
        evaluated.append(session.state.step)
        return {"distance": DISTANCES[session.state.step]}

    def step(number: int, *rest):
        if number + 1 == kill_at:
            raise Killed
        return take_step(number, *rest)

    loop.evaluate, session.engine.step = evaluate, step
    try:
        return loop.train(session), evaluated
    except Killed:
        return None, evaluated


@pytest.mark.slow
def test_training_ends_when_patience_is_over_and_a_resumed_run_at_the_same_evaluation(
    tmp_path: Path,
    pairs: Path,  # noqa: F811
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    assert run_ranks(1, train, whole, pairs, None) == [(0, [0, 2, 4, 6, 8])]
    assert [one["step"] for one in records(whole, "train")] == list(range(1, 9))
    (said,) = records(whole, "early_stop")
    assert said["step"] == 8
    assert said["reason"] == "distance was not better than 4.0000 of step 4 in 2 evaluations (train.patience)"
    assert "steps: 12\n" in (whole / "run" / "config.yaml").read_text(), "4.8 epochs of 40 samples, 16 to a batch"

    assert run_ranks(1, train, parts, pairs, 7) == [(None, [0, 2, 4, 6])]
    state = read_state(newest_valid(parts / "run")[0])
    assert (state.step, state.not_better) == (6, []), "written before the evaluation of its step"
    assert run_ranks(1, train, parts, pairs, None) == [(0, [8])]
    assert [one["step"] for one in records(parts, "train")] == list(range(1, 9))

    assert run_ranks(1, train, parts, pairs, None) == [(0, [])], "a run that ended early is done"
    assert len(records(parts, "early_stop")) == 1
    assert newest_valid(parts / "run")[0].name == "step_00000008"
    assert run_ranks(1, train, whole, pairs, None, "--train.patience", "3") == [(0, [10, 12])]
    assert [one["step"] for one in records(whole, "train")] == list(range(1, 13))
