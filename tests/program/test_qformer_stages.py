"""A Q-Former in two stages through the programs: texts and images first, then a language model's image tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline.census import main as census
from pipeline.checkpoint.files import checkpoint_path
from pipeline.checkpoint.reading import Reader
from pipeline.evaluate import main as evaluate
from pipeline.features import main as write_features
from pipeline.generate import main as generate
from pipeline.plan import main as plan
from pipeline.recording.run_log import LOG_NAME, read_log
from pipeline.weights.sources import read_model
from tests.forked_ranks import run_ranks
from tests.pipeline.data.test_reader import records, write_split
from tests.pipeline.data.test_tokenizer import write_tokenizer
from tests.program.test_evlgen import STEPS, losses, options
from tests.program.test_frozen_tower import zero
from tests.program.test_incidents import train
from tests.tiny_frozen_parts import write_clip, write_language_model

pytestmark = pytest.mark.slow
QFORMER = ["--model.connector.name", "qformer"]


def first_stage(work: Path, output: Path, *more: str) -> list[str]:
    words = options(work, output, "--objective.name", "qformer_stage1", *QFORMER, "--objective.embedding_width", "16")
    place = words.index("--model.language.name")
    return [*words[:place], *words[place + 2 :], "--data.max_text_length", "30", *map(str, more)]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data with a tokenizer, frozen parts, and a first stage on one rank at stage 0."""
    work = tmp_path_factory.mktemp("work")
    write_split(work / "data" / "toy" / "train", records(40))
    write_split(work / "data" / "toy" / "dev", records(40)[:8])
    write_tokenizer(work / "data" / "tokenizer")
    write_clip(work / "clip.safetensors")
    write_language_model(work / "llm")
    assert run_ranks(1, train, first_stage(work, work / "first", *zero(0))) == [0]
    return work


def test_the_second_stage_starts_from_the_first(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every weight is accounted for: the queries' are loaded, the last layer is fresh and as large as words need, what
    texts had is dropped; it trains, and another start with another connector is refused."""
    run = tmp_path / "second"
    assert run_ranks(1, train, options(work, run, *QFORMER, "--model.weights", work / "first")) == [0]
    noted = json.loads((run / "environment.json").read_text())["starting_weights"]["model"]["names"]
    first = Reader(checkpoint_path(work / "first", STEPS)).shapes("weight")
    assert noted["fresh"] == ["net.connector.output.weight", "net.connector.output.bias"]
    assert set(noted["dropped"]) == {name for name in first if not name.startswith("net.connector.")}
    kept = {name for name in first if name.startswith("net.connector.")}
    assert kept == {name for name in noted["loaded"] if name.startswith("net.connector.")}
    before = read_model(str(work / "first"))
    start = tmp_path / "start"
    words = options(work, start, *QFORMER, "--model.weights", work / "first", "--train.steps", "1")
    assert run_ranks(1, train, [*words, "--optim.learning_rate", "1e-30"]) == [0]
    after = read_model(str(start))
    assert all(torch.equal(after[name], before[name]) for name in kept)
    found = losses(run)
    assert len(found) == STEPS and found[-1] < found[0]

    assert evaluate(["--run", str(run), "--split", "dev"]) == 0
    assert "caption_loss" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="model.weights .*: weights lack net.connector"):
        run_ranks(1, train, options(work, tmp_path / "third", "--model.weights", work / "first"))


def test_the_first_stage_is_evaluated_and_writes_no_captions(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = [one for one in read_log(work / "first" / LOG_NAME) if one["kind"] == "eval"][-1]
    assert {"loss", "itc_loss", "itm_loss", "itg_loss", "shuffled/itg_loss", "itc_accuracy"} <= set(last)
    assert "shuffled/itc_loss" not in last
    assert losses(work / "first")[-1] < losses(work / "first")[0]
    assert evaluate(["--run", str(work / "first"), "--split", "dev"]) == 0
    [card] = (work / "first" / "evaluations").glob("*/scorecard.json")
    metrics = json.loads(card.read_text())["metrics"]
    assert metrics["itg_loss"] == pytest.approx(last["itg_loss"], abs=1e-5)
    capsys.readouterr()
    assert generate(["--run", str(work / "first"), "photo.jpg"]) == 2
    assert "qformer_stage1 writes no captions; use one of evlgen that starts from it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "recompute"),
    [
        *(pytest.param(stage, False, marks=pytest.mark.extended) for stage in (0, 2)),
        (1, True),
        pytest.param(3, True, marks=pytest.mark.slow(25)),
    ],
)
def test_ranks_with_equal_micro_batches_give_the_same_losses(
    work: Path, tmp_path: Path, stage: int, recompute: bool
) -> None:
    """Two ranks, stopped and resumed in the middle, at every stage of ZeRO, layers computed again or not."""
    run = tmp_path / "run"
    words = [*zero(stage), "--model.activation_checkpointing", str(recompute).lower()]
    assert run_ranks(2, train, first_stage(work, run, *words, "--train.steps", "3")) == [0, 0]
    assert run_ranks(2, train, first_stage(work, run, *words)) == [0, 0]
    assert losses(run) == pytest.approx(losses(work / "first"), abs=1e-4)


def test_another_micro_batch_is_another_run(work: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert run_ranks(1, train, first_stage(work, run, "--train.steps", "2")) == [0]
    assert run_ranks(1, train, first_stage(work, run, "--train.steps", "3")) == [0]
    with pytest.raises(RuntimeError, match="optim.micro_batch_size 2 -> 4"):
        run_ranks(1, train, first_stage(work, run, "--optim.micro_batch_size", "4"))
    with pytest.raises(RuntimeError, match="finds no other caption in an optim.micro_batch_size of 1"):
        run_ranks(1, train, first_stage(work, tmp_path / "one", "--optim.micro_batch_size", "1"))


def test_it_reads_stored_features(work: Path, tmp_path: Path) -> None:
    words = first_stage(work, tmp_path / "run")
    assert write_features([word for word in words if word not in ("--output", str(tmp_path / "run"))]) == 0
    assert run_ranks(1, train, [*words, "--data.features", "float16"]) == [0]
    assert losses(tmp_path / "run") == pytest.approx(losses(work / "first"), abs=2e-2)


def test_it_is_planned_and_counted(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = first_stage(work, work / "run")
    del words[words.index("--output") : words.index("--output") + 2]
    assert plan([*words, "--gpus", "2", "--gpu-memory", "8", "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)["parameters"]
    shapes = Reader(checkpoint_path(work / "first", STEPS)).shapes("weight").values()
    assert counted == {"trained": sum(torch.Size(shape).numel() for shape in shapes), "frozen": 19_552}
    assert census(words) == 0
    assert f"{counted['trained']:,}" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["captioning", "retrieval"])
def test_other_tasks_are_refused(work: Path, tmp_path: Path, task: str) -> None:
    with pytest.raises(RuntimeError, match="objective.name qformer_stage1 (writes no captions|is for the task)"):
        run_ranks(1, train, first_stage(work, tmp_path / "run", "--task.name", task))
