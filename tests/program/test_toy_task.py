"""A new task needs one file: it trains, is scored, resumes and is reported by the loop that knows nothing of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from data_prep.drawn.synth import SynthOptions, write_corpora
from data_prep.tokenizer import train_tokenizer
from pipeline.config.command_line import parse_command_line
from pipeline.distributed.connecting import Ranks
from pipeline.distributed.preempt import StopRequest
from pipeline.distributed.ranks import Agreement
from pipeline.recording.run_log import read_log
from pipeline.training.loop import train as loop
from pipeline.training.session import resolve_ds_config, set_up
from tests import toy_task
from tests.forked_ranks import run_ranks

STEPS = 12


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    sizes = {"train": 40, "dev": 14, "test": 0}
    write_corpora(folder / "synth", SynthOptions(sizes, image_size=32, pair_share=1))
    train_tokenizer([folder / "synth" / "train"], folder / "tokenizer", 300)
    return folder


def train(place, folder: Path, pairs: Path, steps: int) -> int:
    os.chdir(folder)
    words = ["--recipe", "flm_tiny", "--data", str(pairs / "synth_pairs"), "--output", "run"]
    words += ["--data.tokenizer", str(pairs / "tokenizer"), "--train.steps", str(steps), "--train.eval_every", "2"]
    words += ["--train.log_every", "1", "--train.save_every", "4", "--train.keep_best", "distance"]
    words += ["--train.keep_last", "1", "--optim.learning_rate", "0.05", "--optim.warmup_fraction", "0"]
    words += ["--optim.schedule", "constant"]
    launch = parse_command_line([*words, "--train.eval_samples", "13", "--tracking.tensorboard", "false"])
    device = torch.device("cpu")
    ranks = Ranks(place, device, Agreement(), StopRequest().listen())
    return loop(set_up(launch, resolve_ds_config(launch, place, device), toy_task.ToyTask(), ranks))


def records(folder: Path, kind: str) -> list[dict]:
    return [record for record in read_log(folder / "run" / "log.jsonl") if record["kind"] == kind]


@pytest.mark.slow
def test_a_task_of_two_images_and_soft_targets(tmp_path: Path, pairs: Path) -> None:
    """Two ranks, ZeRO-1; the best checkpoint is the one of the lowest distance; the run goes on where it stopped."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    assert run_ranks(2, train, whole, pairs, STEPS) == [0, 0]
    assert run_ranks(1, train, parts, pairs, 4) == [0]
    assert run_ranks(2, train, parts, pairs, STEPS) == [0, 0]
    found, again = ({r["step"]: r["short_loss"] for r in records(folder, "train")} for folder in (whole, parts))
    assert list(found) == list(range(1, STEPS + 1)) and min(found.values()) < found[1]
    assert again == pytest.approx(found, rel=1e-4)  # other sums over ranks, steps upon steps: as in test_old_runs.py

    distances = {record["step"]: record["distance"] for record in records(whole, "eval")}
    best = json.loads((whole / "run" / "checkpoints" / "best.json").read_text())
    lowest = min((step for step in distances if step), key=distances.get)
    assert (best["metric"], best["step"]) == ("distance", lowest) and distances[lowest] < distances[0]
    assert (whole / "run" / "checkpoints" / f"step_{lowest:08d}").is_dir()

    predictions = json.loads((whole / "run" / "evaluations" / f"held_out-step_{STEPS:08d}" / "shares.json").read_text())
    assert [one["position"] for one in predictions] == list(range(13)), "each held-out item once"
    assert len({one["key"] for one in predictions}) == 13
    page = (whole / "run" / "report.html").read_text()
    assert "Held-out distance" in page and "lower is better" in page


def test_the_toy_is_small() -> None:
    """The promise is one file of at most 100 lines."""
    assert len(Path(toy_task.__file__).read_text().splitlines()) <= 100
