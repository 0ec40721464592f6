"""The contrastive term through the programs: resume, evaluation, what starts from such a run, its export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.tokenizer import train_tokenizer
from pipeline.checkpoint.files import checkpoint_path
from pipeline.checkpoint.reading import Reader
from pipeline.evaluate import main as evaluate
from pipeline.export import main as export
from pipeline.recording.run_log import read_log
from tests.forked_ranks import run_ranks
from tests.gallery import write_gallery
from tests.program.test_incidents import train
from tests.program.test_program import SHORT

pytestmark = pytest.mark.slow
STEPS = 4
ON = ("--objective.itc_weight", "0.5", "--objective.itc_width", "16", "--data.texts_per_image", "3")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with one to five texts each, and ``run``, trained on one rank with an evaluation at its end."""
    folder = tmp_path_factory.mktemp("contrast")
    write_gallery(folder / "data" / "toy" / "train", 40)
    write_gallery(folder / "data" / "toy" / "dev", 12)
    train_tokenizer([folder / "data" / "toy" / "train"], folder / "data" / "tokenizer", 300)
    start(folder / "run", folder, *ON)
    return folder


def start(run: Path, work: Path, *more: Any, steps: int = STEPS) -> None:
    words = [*SHORT, "--data", work / "data", "--output", run, "--train.steps", steps, "--train.eval_every", 0]
    words += [
        "--train.eval_samples",
        "null",
        "--train.save_every",
        0,
        "--optim.schedule",
        "constant",
        "--model.text.dropout",
        0,
    ]
    assert run_ranks(1, train, [str(word) for word in [*words, *more]]) == [0]


def logged(run: Path, kind: str) -> list[dict[str, float]]:
    """Losses of both kinds of lines, and accuracies."""
    lines = [line for line in read_log(run / "log.jsonl") if line["kind"] == kind]
    return [{name: line[name] for name in line if "loss" in name or "accuracy" in name} for line in lines]


def test_stopped_and_resumed_it_is_the_same_run(work: Path, tmp_path: Path) -> None:
    """Invariant 2, bit for bit."""
    start(tmp_path / "parts", work, *ON, steps=2)
    start(tmp_path / "parts", work, *ON)
    assert logged(tmp_path / "parts", "train") == logged(work / "run", "train")
    ends = [Reader(checkpoint_path(run, STEPS)) for run in (tmp_path / "parts", work / "run")]
    for name in ends[0].shapes("weight"):
        assert (ends[0].read("weight", name) == ends[1].read("weight", name)).all(), name
    assert all(line["itc_loss"] > 0.1 for line in logged(work / "run", "train"))


def test_it_is_evaluated_as_other_terms_are(work: Path) -> None:
    """In training and by the program alike; another sample's image says nothing of it."""
    assert evaluate(["--run", str(work / "run"), "--split", "dev", "--device", "cpu", "--batch-size", "4"]) == 0
    (card,) = (work / "run").glob("evaluations/*/scorecard.json")
    metrics, last = json.loads(card.read_text())["metrics"], logged(work / "run", "eval")[-1]
    assert metrics["itc_loss"] > 0 and 0 <= metrics["itc_accuracy"] <= 1
    assert {name: metrics[name] for name in last} == pytest.approx(last)
    assert not any("itc" in name for name in metrics if name.startswith("shuffled/"))


def test_what_starts_from_it_leaves_its_head_behind(work: Path, tmp_path: Path) -> None:
    """Captioning; a run with the term goes on with the head. An exported folder serves as the run does."""
    assert export([str(work / "run"), str(tmp_path / "exported")]) == 0
    still = ("--model.weights", tmp_path / "exported", "--optim.learning_rate", "1e-30")
    start(tmp_path / "captioning", work, *still, "--task.name", "captioning", steps=1)
    start(tmp_path / "again", work, *still, *ON, steps=1)
    before = Reader(checkpoint_path(work / "run", STEPS))
    name = "itc_head.text_projection.weight"
    for run in ("captioning", "again"):
        after = Reader(checkpoint_path(tmp_path / run, 1))
        assert (name in after.shapes("weight")) == (run == "again")
        for kept in ("net.text_projection.weight", *([name] if run == "again" else [])):
            assert (after.read("weight", kept) == before.read("weight", kept)).all()
