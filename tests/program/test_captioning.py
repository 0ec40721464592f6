"""Captioning through the real loop: from a pretrained FLM run on two ranks, with both streams, by its own rewards."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from data_prep.tokenizer import train_tokenizer
from pipeline.config.command_line import parse_command_line
from pipeline.distributed.connecting import Ranks
from pipeline.distributed.preempt import StopRequest
from pipeline.distributed.ranks import Agreement
from pipeline.evaluate import main as evaluate
from pipeline.finetuning.table import task_of
from pipeline.generate import main as generate
from pipeline.recording.run_log import read_log
from pipeline.training.loop import train as loop
from pipeline.training.session import resolve_ds_config, set_up
from tests.forked_ranks import run_ranks
from tests.gallery import write_gallery

REPOSITORY = Path(__file__).resolve().parents[2]


def train(place, folder: Path, *options: str) -> int:
    os.chdir(folder)
    words = ["--recipe", "flm_tiny", "--data", "data", "--train.log_every", "1", "--train.save_every", "0"]
    words += ["--tracking.tensorboard", "false", "--optim.batch_size", "8", "--optim.micro_batch_size", "2"]
    words += ["--train.eval_every", "0", "--train.eval_samples", "7", "--optim.learning_rate", "0.003"]
    words += ["--deepspeed", str(REPOSITORY / "ds_configs" / "zero2.json"), *options]
    launch, device = parse_command_line(words), torch.device("cpu")
    ranks = Ranks(place, device, Agreement(), StopRequest().listen())
    return loop(set_up(launch, resolve_ds_config(launch, place, device), task_of(launch.config), ranks))


def logged(run: Path, kind: str) -> list[dict]:
    return [record for record in read_log(run / "log.jsonl") if record["kind"] == kind]


@pytest.mark.slow
def test_pretrained_fine_tuned_scored_and_rewarded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The captioner starts from FLM's weights without its reconstructor; its captions end at different words on two
    ranks, and all come to an end; the run's own scores are those of ``pipeline.evaluate``."""
    for split in ("train", "dev"):
        write_gallery(tmp_path / "data" / "toy" / split, 11)
    train_tokenizer([tmp_path / "data" / "toy" / "train"], tmp_path / "data" / "tokenizer", 300)
    assert run_ranks(2, train, tmp_path, "--output", "flm", "--train.steps", "2") == [0, 0]
    task = ("--task.name", "captioning", "--task.max_tokens", "12")
    options = (
        *task,
        "--model.weights",
        "flm",
        "--output",
        "run",
        "--train.steps",
        "30",
        "--train.keep_best",
        "cider_d",
    )
    assert run_ranks(2, train, tmp_path, *options) == [0, 0]
    run = tmp_path / "run"
    losses = [record["caption_loss"] for record in logged(run, "train")]
    assert losses[-1] < losses[0] - 0.5
    start = json.loads((run / "environment.json").read_text())["starting_weights"]["model"]["names"]
    assert any("reconstructor" in name for name in start["dropped"])
    assert not [name for name in start["fresh"] if name.startswith(("net.", "lm_head."))]
    last = logged(run, "eval")[-1]
    assert {"cider_d", "loss", "cider_d_wrong_image", "caption_accuracy"} <= set(last) and last["captions"] == 7

    monkeypatch.chdir(tmp_path)
    assert evaluate(["--run", "run", "--samples", "7"]) == 0
    assert "Evaluation: captioning" in (run / "report.html").read_text()
    [card] = (run / "evaluations").glob("captioning-*/scorecard.json")
    found = json.loads(card.read_text())
    assert found["metrics"]["cider_d"] == pytest.approx(last["cider_d"], abs=1e-4)
    assert found["decoding"] == {"name": "greedy"} and "tokenization" in found["protocol"]
    lines = [json.loads(line) for line in (card.parent / "predictions.jsonl").read_text().splitlines()]
    assert {"position", "key", "image_id", "caption", "references", "log_probability", "cider_d"} == set(lines[0])
    assert generate(["--run", "run", "--data", "data", "--samples", "3", "--nucleus", "0.8"]) == 0
    assert "Nucleus sampling" in capsys.readouterr().out

    both = (
        *task,
        "--task.r2l_weight",
        "1",
        "--task.decoding",
        "both_ways",
        "--model.weights",
        "flm",
        "--output",
        "both",
    )
    assert run_ranks(2, train, tmp_path, *both, "--train.steps", "2") == [0, 0]
    assert all({"caption_loss", "r2l_loss"} <= set(record) for record in logged(tmp_path / "both", "train"))
    last = logged(tmp_path / "both", "eval")[-1]
    assert {"cider_d", "r2l_loss"} <= set(last) and last["captions"] == 7
    start = json.loads((tmp_path / "both" / "environment.json").read_text())["starting_weights"]["model"]["names"]
    assert "net.stream_embedding.weight" not in [*start["dropped"], *start["fresh"]], "the reverse stream goes on"

    rewarded = (*task, "--task.self_critical", "true", "--model.weights", "run", "--output", "cider")
    assert run_ranks(2, train, tmp_path, *rewarded, "--train.steps", "3", "--optim.learning_rate", "1e-4") == [0, 0]
    assert all("self_critical_loss" in record for record in logged(tmp_path / "cider", "train"))
    assert "cider_d" in logged(tmp_path / "cider", "eval")[-1]
