"""EVLGen's second stage through the programs: adapters of the language model, from the connector of a first run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.checkpoint.files import checkpoint_path
from pipeline.checkpoint.reading import Reader
from pipeline.checkpoint.restore import read_state
from pipeline.evaluate import main as evaluate
from pipeline.generate import main as generate
from pipeline.language_weights import loading
from pipeline.plan import main as plan
from tests.forked_ranks import run_ranks
from tests.pipeline.data.test_reader import records, write_split
from tests.program.test_evlgen import STEPS, losses, options
from tests.program.test_frozen_tower import zero
from tests.program.test_incidents import train
from tests.tiny_frozen_parts import write_clip, write_language_model

pytestmark = pytest.mark.slow
LORA = ["--model.language.lora_rank", "4", "--model.language.lora_dropout", "0.1"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, frozen parts, and a run of the first stage."""
    work = tmp_path_factory.mktemp("work")
    write_split(work / "data" / "toy" / "train", records(40))
    write_split(work / "data" / "toy" / "dev", records(40)[:8])
    write_clip(work / "clip.safetensors")
    write_language_model(work / "llm")
    assert run_ranks(1, train, options(work, work / "first")) == [0]
    return work


def second(work: Path, output: Path, *more: str) -> list[str]:
    return options(work, output, "--model.weights", work / "first", *more)


@pytest.mark.slow(25)
def test_adapters_begin_as_the_first_stage_and_are_trained(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss of the first step is that of going on without adapters, to the bit; connector and adapters alone stand
    in the checkpoint; it resumes bit for bit, is evaluated, captions, and a third run goes on from it."""
    assert run_ranks(1, train, second(work, tmp_path / "without")) == [0]
    run = tmp_path / "run"
    assert run_ranks(1, train, second(work, run, *LORA)) == [0]
    found, without = losses(run), losses(tmp_path / "without")
    assert found[0] == without[0] and found[2] != without[2]

    path = checkpoint_path(run, STEPS)
    names = set(Reader(path).shapes("weight"))
    adapters = {name for name in names if not name.startswith("net.connector.")}
    layers = [f"net.language.llm.model.layers.{n}.self_attn.{p}_proj.adapter" for n in (0, 1) for p in "qv"]
    assert adapters == {f"{layer}.{half}.weight" for layer in layers for half in ("down", "up")}
    before = read_state(checkpoint_path(work / "first", STEPS)).frozen
    assert read_state(path).frozen["sha256"] == before["sha256"]
    noted = json.loads((run / "environment.json").read_text())["starting_weights"]["model"]["names"]
    assert set(noted["fresh"]) == adapters and noted["dropped"] == []
    assert set(noted["loaded"]) == names - adapters | set(before["names"])

    resumed = tmp_path / "resumed"
    assert run_ranks(1, train, second(work, resumed, *LORA, "--train.steps", "4")) == [0]
    assert run_ranks(1, train, second(work, resumed, *LORA)) == [0]
    assert losses(resumed) == found  # bit for bit

    capsys.readouterr()
    assert evaluate(["--run", str(run), "--split", "dev"]) == 0
    assert "caption_loss" in capsys.readouterr().out
    Image.new("RGB", (40, 40), "red").save(tmp_path / "picture.png")
    assert generate(["--run", str(run), str(tmp_path / "picture.png")]) == 0

    third = options(work, tmp_path / "third", "--model.weights", run, *LORA)
    assert run_ranks(1, train, third) == [0]
    noted = json.loads((tmp_path / "third" / "environment.json").read_text())["starting_weights"]["model"]["names"]
    assert noted["fresh"] == [] and adapters <= set(noted["loaded"])
    for other in ([], ["--model.language.lora_rank", "4", "--model.language.lora_modules", "[q_proj]"]):
        with pytest.raises(RuntimeError, match="has adapters of its language model .*; set model.language.lora_rank"):
            run_ranks(1, train, options(work, tmp_path / "fourth", "--model.weights", run, *other))
    alpha = options(work, tmp_path / "fourth", "--model.weights", run, *LORA, "--model.language.lora_alpha", "8")
    with pytest.raises(RuntimeError, match="has adapters with model.language.lora_alpha 16, found 8, .* use the run's"):
        run_ranks(1, train, alpha)
    other = write_language_model(tmp_path / "other", seed=1)
    words = ["--model.weights", run, *LORA, "--model.language.name", other]
    with pytest.raises(
        RuntimeError, match="has adapters of the language model .*llm, found .*other with other weights"
    ):
        run_ranks(1, train, options(work, tmp_path / "fourth", *words))
    with pytest.raises(RuntimeError, match="adapter.down.weight has shape .4, 32., the model's .*8, 32"):
        words = ["--model.weights", run, "--model.language.lora_rank", "8"]
        run_ranks(1, train, options(work, tmp_path / "fourth", *words))


def test_the_language_model_is_read_once(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a run that starts from a run, by rank 0 alone; it is hashed out of the model that is trained."""
    real, noted = loading.copy_weights, tmp_path / "noted"

    def copy_weights(*arguments: Any) -> Any:
        with open(noted, "a") as file:
            file.write("read\n")
        return real(*arguments)

    monkeypatch.setattr(loading, "copy_weights", copy_weights)
    assert run_ranks(2, train, second(work, tmp_path / "run", *LORA, "--train.steps", "1")) == [0, 0]
    assert noted.read_text() == "read\n"


@pytest.fixture(scope="module")
def one_rank(work: Path) -> list[float]:
    """Losses of one rank at stage 0, without dropout, which differs by rank."""
    assert run_ranks(1, train, second(work, work / "reference", *LORA[:2], *zero(0))) == [0]
    return losses(work / "reference")


@pytest.mark.parametrize(
    ("stage", "recompute"),
    [
        *(pytest.param(stage, False, marks=pytest.mark.extended) for stage in (0, 1, 3)),
        (2, True),
        pytest.param(3, True, marks=pytest.mark.slow(25)),
    ],
)
def test_stages_and_ranks_give_the_same_losses(
    work: Path, tmp_path: Path, one_rank: list[float], stage: int, recompute: bool
) -> None:
    """Two ranks, stopped and resumed in the middle, at every stage of ZeRO, layers computed again or not."""
    run = tmp_path / "run"
    words = [*LORA[:2], *zero(stage), "--model.activation_checkpointing", str(recompute).lower()]
    assert run_ranks(2, train, second(work, run, *words, "--train.steps", "3")) == [0, 0]
    assert run_ranks(2, train, second(work, run, *words)) == [0, 0]
    assert losses(run) == pytest.approx(one_rank, abs=1e-4)


def test_adapters_are_planned_and_counted(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = options(work, work / "run", "--model.language.lora_rank", "4")
    del words[words.index("--output") : words.index("--output") + 2]
    assert plan([*words, "--gpus", "2", "--gpu-memory", "8", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    adapters = 4 * 4 * (32 + 32)  # q_proj and v_proj of two layers, rank 4
    assert said["parameters"] == {"trained": 20_384 + adapters, "frozen": 19_552 + 28_864}


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (["--model.language.lora_rank", "4", "--model.language.lora_modules", "[q_proj,qkv]"], "is called qkv; exp"),
        (["--model.language.lora_alpha", "4"], "lora_alpha has no effect with model.language.lora_rank 0"),
    ],
)
def test_what_does_not_fit_is_one_line(work: Path, tmp_path: Path, more: list[str], error: str) -> None:
    with pytest.raises(RuntimeError, match=error):
        run_ranks(1, train, second(work, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()
