"""Retrieval is trained and scored on several ranks, which share the weights at ZeRO-3 and keep step in every tile."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from data_prep.tokenizer import train_tokenizer
from pipeline.config.command_line import parse_command_line
from pipeline.distributed.preempt import StopRequest
from pipeline.distributed.ranks import Agreement
from pipeline.evaluate import main
from pipeline.finetuning.retrieval import Retrieval
from pipeline.finetuning.table import task_of
from pipeline.recording.run_log import read_log
from pipeline.training.loop import train as loop
from pipeline.training.session import Ranks, resolve_ds_config, set_up
from tests.forked_ranks import run_ranks
from tests.gallery import captions, write_gallery

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gallery")
    write_gallery(folder / "toy" / "train", 24)
    write_gallery(folder / "toy" / "dev", 7)
    train_tokenizer([folder / "toy" / "train"], folder / "tokenizer", 300)
    return folder


def train(place, folder: Path, data: Path, stage: int, words: list[str], task: str = "retrieval") -> int:
    os.chdir(folder)
    base = ["--recipe", "flm_tiny", "--task.name", task, "--data", str(data), "--output", "run"]
    base += ["--deepspeed", str(REPOSITORY / "ds_configs" / f"zero{stage}.json"), "--train.steps", "4"]
    base += ["--train.eval_every", "2", "--train.log_every", "1", "--train.keep_best", "mean_recall"]
    base += ["--tracking.tensorboard", "false", "--train.eval_samples", "null", "--optim.batch_size", "8"]
    launch = parse_command_line([*base, *words])
    device = torch.device("cpu")
    ranks = Ranks(place, device, Agreement(), StopRequest().listen())
    return loop(set_up(launch, resolve_ds_config(launch, place, device), task_of(launch.config), ranks))


def score(place, folder: Path, words: list[str]) -> int:
    os.chdir(folder)
    return main(["--run", "run", "--device", "cpu", *words])


def scorecard(folder: Path) -> dict:
    (found,) = folder.glob("run/evaluations/retrieval-toy-dev-*/scorecard.json")
    return json.loads(found.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("negatives", ["in_batch"])
def test_ranks_and_stages_agree(tmp_path: Path, data: Path, negatives: str) -> None:
    """Seven images in batches of four: one rank has a batch of three, or at the end none."""
    words = ["--task.negatives", negatives, "--task.num_negatives", "3", "--optim.micro_batch_size", "4"]
    words += ["--model.text.dropout", "0"]
    found = []
    for name, world, stage in (("one", 1, 0), ("two", 2, 3)):
        folder = tmp_path / name
        folder.mkdir()
        assert run_ranks(world, train, folder, data, stage, words) == [0] * world
        records = read_log(folder / "run" / "log.jsonl")
        found.append({record["step"]: record for record in records if record["kind"] == "eval"})
        losses = [record["i2t_loss"] for record in records if record["kind"] == "train"]
        assert len(losses) == 4 and all(0 < loss < 10 for loss in losses)
    names = [score.name for score in Retrieval().scores(torch.nn.Identity())] + ["images", "captions"]
    assert [found[0][0][name] for name in names] == [found[1][0][name] for name in names], "before the first step"
    assert sorted(found[0]) == sorted(found[1]) and found[0][0]["images"] == 7
    assert run_ranks(1, score, tmp_path / "one", ["--batch-size", "2"]) == [0]
    card = scorecard(tmp_path / "one")
    assert {name: card["metrics"][name] for name in names} == {name: found[0][4][name] for name in names}
    assert card["protocol"]["ties"] and "tr_at_1" in card["standard_errors"]


@pytest.mark.slow
def test_a_pretrained_run_is_scored_as_it_is(tmp_path: Path, data: Path) -> None:
    assert run_ranks(1, train, tmp_path, data, 0, ["--train.keep_best", "null"], "pretraining") == [0]
    assert run_ranks(1, score, tmp_path, ["--task", "retrieval"]) == [0]
    assert scorecard(tmp_path)["metrics"]["captions"] == sum(len(captions(number)) for number in range(7))
