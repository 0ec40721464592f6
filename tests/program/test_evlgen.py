"""EVLGen through the programs: trained on frozen parts, resumed, evaluated; a checkpoint holds what is trained only."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.checkpoint.files import checkpoint_path
from pipeline.checkpoint.reading import Reader
from pipeline.checkpoint.restore import read_state
from pipeline.evaluate import main as evaluate
from pipeline.features import main as write_features
from pipeline.generate import main as generate
from pipeline.plan import main as plan
from pipeline.recording.run_log import LOG_NAME, read_log
from pipeline.weights.sources import read_model
from tests.forked_ranks import run_ranks
from tests.pipeline.data.test_reader import records, write_split
from tests.program.test_frozen_tower import zero
from tests.program.test_incidents import train
from tests.tiny_frozen_parts import write_clip, write_language_model

pytestmark = pytest.mark.slow
STEPS = 6


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("work")
    write_split(work / "data" / "toy" / "train", records(40))
    write_split(work / "data" / "toy" / "dev", records(40)[:8])
    write_clip(work / "clip.safetensors")
    write_language_model(work / "llm")
    return work


def options(work: Path, output: Path, *more: Any, recipe: str = "evlgen_tiny") -> list[str]:
    settings = {
        "recipe": recipe,
        "data": work / "data",
        "output": output,
        "model.language.name": work / "llm",
        "model.vision.pretrained": work / "clip.safetensors",
        "model.vision.frozen": "true",
        "optim.batch_size": 8,
        "optim.micro_batch_size": 2,
        "train.steps": STEPS,
        "train.save_every": 2,
        "train.keep_last": 9,
        "train.eval_every": 0,
        "train.log_every": 1,
        "optim.schedule": "constant",  # the same steps whatever their number
        "optim.warmup_fraction": 0,
        "tracking.tensorboard": "false",
        "tracking.report": "false",
    }
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))] + [str(one) for one in more]


def losses(run: Path) -> list[float]:
    return [one["loss"] for one in read_log(run / LOG_NAME) if one["kind"] == "train"]


def test_it_trains_resumes_and_is_evaluated(work: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert run_ranks(1, train, options(work, run)) == [0]
    before = load_file(work / "llm" / "model.safetensors")
    path = checkpoint_path(run, STEPS)
    frozen = read_state(path).frozen
    assert {name.split(".")[1] for name in frozen["names"]} == {"vision", "language"}
    assert all(name.startswith("net.connector.") for name in Reader(path).shapes("weight"))
    noted = json.loads((run / "environment.json").read_text())["starting_weights"]
    assert noted["language"]["taken"] == str(work / "llm") and len(noted["language"]["names"]["loaded"]) == len(before)
    found = losses(run)
    assert len(found) == STEPS and found[-1] < found[0]

    resumed = tmp_path / "resumed"
    assert run_ranks(1, train, options(work, resumed, "--train.steps", 4)) == [0]
    assert run_ranks(1, train, options(work, resumed)) == [0]
    assert losses(resumed) == found  # bit for bit

    assert evaluate(["--run", str(run), "--split", "dev"]) == 0
    said = capfd.readouterr().out
    assert "caption_loss" in said


def test_a_connector_begins_with_the_first_images(work: Path, tmp_path: Path) -> None:
    """On any number of ranks, unless it is told not to; one that goes on from a run is left as it is."""
    names = ("net.connector.norm.weight", "net.connector.norm.bias")

    def begun(name: str, *more: Any, ranks: int = 1) -> torch.Tensor:
        still = ("--train.steps", 1, "--optim.learning_rate", "1e-30", "--train.save_every", 1, *more)
        assert run_ranks(ranks, train, options(work, tmp_path / name, *still)) == [0] * ranks
        reader = Reader(checkpoint_path(tmp_path / name, 1))
        return torch.stack([reader.read("weight", one) for one in names]).round(decimals=20)  # without its one step

    alone, together = begun("alone"), begun("together", ranks=2)
    assert torch.equal(alone, together)
    plain = begun("plain", "--model.connector.standardise", "false")
    assert torch.equal(plain, torch.tensor([1.0, 0.0])[:, None].expand(2, 32))
    assert torch.equal(plain, begun("on", "--model.weights", tmp_path / "plain"))
    assert not torch.equal(alone[0], plain[0]) and not torch.equal(alone[1], plain[1])


@pytest.mark.slow(27)
def test_captions_are_trained_scored_and_written(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The task captioning from a pretrained run on two ranks, whose captions end at different words; the run's own
    loss is that of ``pipeline.evaluate``."""
    monkeypatch.chdir(tmp_path)
    assert run_ranks(1, train, options(work, tmp_path / "run", "--train.steps", 2)) == [0]
    task = ["--task.name", "captioning", "--task.max_tokens", 8, "--model.weights", tmp_path / "run"]
    assert run_ranks(2, train, options(work, tmp_path / "captions", *task)) == [0, 0]
    last = [one for one in read_log(tmp_path / "captions" / LOG_NAME) if one["kind"] == "eval"][-1]
    assert {"cider_d", "loss", "cider_d_wrong_image", "caption_accuracy"} <= set(last)
    assert evaluate(["--run", "captions", "--split", "dev", "--task.decoding", "beam"]) == 0
    [card] = (tmp_path / "captions" / "evaluations").glob("captioning-*/scorecard.json")
    found = json.loads(card.read_text())
    assert found["metrics"]["caption_loss"] == pytest.approx(last["caption_loss"], abs=1e-5)
    assert found["decoding"]["name"] == "beam" and "cider_d" in found["metrics"]
    lines = [json.loads(line) for line in (card.parent / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and all(line["log_probability"] < 0 for line in lines)
    assert generate(["--run", "captions", "--data", str(work / "data"), "--split", "dev", "--samples", "3"]) == 0
    assert "error" not in capsys.readouterr().err


def test_a_run_with_another_language_model_starts_from_its_connector(work: Path, tmp_path: Path) -> None:
    """The language model is the one that is named, whichever the run had; of another width it is refused."""
    assert run_ranks(1, train, options(work, tmp_path / "run", "--train.steps", 2)) == [0]
    other = write_language_model(tmp_path / "other", seed=1)
    words = ["--model.weights", tmp_path / "run", "--model.language.name", other]
    assert run_ranks(1, train, options(work, tmp_path / "next", *words, "--train.steps", 2)) == [0]
    found = read_model(str(tmp_path / "next"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(found[f"net.language.llm.{name}"], load_file(other / "model.safetensors")[name])
    assert run_ranks(1, train, options(work, tmp_path / "next", *words, "--train.steps", 3)) == [0]  # it resumes
    wide = write_language_model(tmp_path / "wide", width=64)
    with pytest.raises(RuntimeError, match="has shape .*, the model's"):
        run_ranks(1, train, options(work, tmp_path / "third", *words[:2], "--model.language.name", wide))


@pytest.fixture(scope="module")
def one_rank(work: Path) -> list[float]:
    """Losses of one rank at stage 0."""
    assert run_ranks(1, train, options(work, work / "reference", *zero(0))) == [0]
    return losses(work / "reference")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_stages_and_ranks_give_the_same_losses(work: Path, tmp_path: Path, one_rank: list[float], stage: int) -> None:
    """Two ranks, stopped and resumed in the middle, at every stage of ZeRO, with frozen parts."""
    run = tmp_path / "run"
    assert run_ranks(2, train, options(work, run, *zero(stage), "--train.steps", 3)) == [0, 0]
    assert run_ranks(2, train, options(work, run, *zero(stage))) == [0, 0]
    assert losses(run) == pytest.approx(one_rank, abs=1e-4)


def test_stored_features_stand_for_images(work: Path, tmp_path: Path, one_rank: list[float]) -> None:
    """On two ranks at stages 0 and 3: the losses of training on images, but for the rounding to fp16; no image is
    decoded, and the evaluation reads features too."""
    data = tmp_path / "data"
    shutil.copytree(work / "data", data)
    words = ["--data", str(data), "--data.features", "float16", "--data.num_workers", "1"]
    of_tower = options(work, tmp_path / "run", "--data", data)
    assert write_features([word for word in of_tower if word not in ("--output", str(tmp_path / "run"))]) == 0
    for number, stage in enumerate((0, 3)):
        run = tmp_path / f"run-{number}"
        assert run_ranks(2, train, options(work, run, *zero(stage), *words)) == [0, 0]
        assert losses(run) == pytest.approx(one_rank, abs=2e-3) and losses(run) != one_rank
    last = [one for one in read_log(tmp_path / "run-0" / LOG_NAME) if one["kind"] == "eval"][-1]
    assert evaluate(["--run", str(tmp_path / "run-0"), "--split", "dev"]) == 0
    [card] = (tmp_path / "run-0" / "evaluations").glob("*/scorecard.json")
    assert json.loads(card.read_text())["metrics"]["caption_loss"] == pytest.approx(last["caption_loss"], abs=1e-5)
    shutil.rmtree(next((data / "toy" / "dev").glob("features-*")))
    with pytest.raises(RuntimeError, match="no features of this tower beside the shards"):
        run_ranks(1, train, options(work, tmp_path / "again", *words))
    assert not (tmp_path / "again").exists()


def test_it_is_planned_and_counted(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its configuration alone: no weights are read, of the tower or of the language model."""
    words = options(work, work / "run", "--model.vision.pretrained", "not read")
    del words[words.index("--output") : words.index("--output") + 2]
    assert plan([*words, "--gpus", "2", "--gpu-memory", "8", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["parameters"] == {"trained": 20_384, "frozen": 19_552 + 28_864}  # as the census says
    assert said["best"]["memory_by_part"]["frozen weights"] > 0


def test_other_frozen_weights_are_refused(work: Path, tmp_path: Path) -> None:
    """By their hash, whichever part it is."""
    run = tmp_path / "run"
    assert run_ranks(1, train, options(work, run, "--train.steps", 2)) == [0]
    file = work / "llm" / "model.safetensors"
    kept = file.read_bytes()
    state = load_file(file)
    state["model.norm.weight"] = state["model.norm.weight"] * 1.001
    try:
        save_file(state, file, metadata={"format": "pt"})
        with pytest.raises(RuntimeError, match="was trained with frozen weights of .*llm with SHA-256"):
            run_ranks(1, train, options(work, run))
    finally:
        file.write_bytes(kept)


def test_folders_that_do_not_fit_are_one_line(work: Path, tmp_path: Path) -> None:
    """Weights that are no safetensors, a tokenizer of more tokens than the table has rows, another width of tower."""
    folder = write_language_model(tmp_path / "llm")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["surplus"] = len(tokenizer["model"]["vocab"])
    words = options(work, tmp_path / "run", "--model.language.name", folder)
    (folder / "model.safetensors").rename(folder / "model.bin")
    with pytest.raises(RuntimeError, match="llm: has neither model.safetensors nor .*; give a folder or hub name with"):
        run_ranks(1, train, words)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(RuntimeError, match="the tokenizer has 258 tokens, model.language.name .*llm 257; use its own"):
        run_ranks(1, train, words)
    assert run_ranks(1, train, options(work, tmp_path / "first", "--train.steps", 2)) == [0]
    clip = write_clip(tmp_path / "wide.safetensors", width=64)
    wide = ["--model.weights", tmp_path / "first", "--model.vision.width", 64, "--model.vision.pretrained", clip]
    with pytest.raises(RuntimeError, match="model.weights .*first: net.* has shape .*, the model's net.*64"):
        run_ranks(1, train, options(work, tmp_path / "run", *wide))
    assert not (tmp_path / "run").exists()


def test_the_releases_dropout_is_an_option(work: Path, tmp_path: Path) -> None:
    """Of OPT, in training: other losses, which a resume repeats bit for bit; nothing more in the checkpoint."""
    folder = write_language_model(tmp_path / "opt", "opt")
    words = ["--model.language.name", folder, "--model.behaviour", "released"]
    words += ["--model.connector.num_tokens", 6, "--train.steps", 3]
    dropout = ["--model.language.own_dropout", "true"]
    runs = [options(work, tmp_path / "without", *words), options(work, tmp_path / "with", *words, *dropout)]
    assert [run_ranks(1, train, one) for one in runs] == [[0], [0]]
    found = losses(tmp_path / "with")
    assert found[0] != losses(tmp_path / "without")[0]
    assert all(
        name.startswith("net.connector.") for name in Reader(checkpoint_path(tmp_path / "with", 3)).shapes("weight")
    )
    again = options(work, tmp_path / "again", *words, *dropout)
    assert run_ranks(1, train, [*again, "--train.steps", "2"]) == [0]
    assert run_ranks(1, train, again) == [0]
    assert losses(tmp_path / "again") == found
    assert evaluate(["--run", str(tmp_path / "with"), "--split", "dev"]) == 0
    llama = options(work, tmp_path / "llama", *words[2:], *dropout)
    with pytest.raises(RuntimeError, match="own_dropout has no effect: model.language.name .*llm has no dropout"):
        run_ranks(1, train, llama)
    with pytest.raises(RuntimeError, match="own_dropout is of model.behaviour released only"):
        run_ranks(1, train, options(work, tmp_path / "default", "--model.language.own_dropout", "true"))


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (["--model.text.width", "64"], "model.text.width has no effect: objective.name evlgen has no such part"),
        (["--task.name", "retrieval"], "objective.name evlgen is for the tasks pretraining, captioning, vqa"),
        (
            ["--model.language.name", "null"],
            "evlgen needs a language model, found model.language.name null",
        ),
        (
            ["--model.language.name", "/nowhere/llm"],
            "/nowhere/llm: no such folder; model.language.name is the folder of",
        ),
        (["--model.connector.num_tokens", "2"], "2 tokens can't remain of 17 after 2 layers; 5 can at least"),
        (
            ["--model.connector.merges_per_layer", "12", "--model.connector.layers", "5"],
            "merges_per_layer 12 merges all 17 tokens of an image into one; expected at most 3",
        ),
        (
            ["--model.language.name", "somebody/no-such-model"],
            "somebody/no-such-model: neither a folder nor to be had from the Hugging Face hub",
        ),
        (["--model.connector.name", "pooling", "--model.connector.num_tokens", "7"], "pooling can't make 7 tokens"),
        (["--model.connector.name", "pooling", "--model.connector.pretrained", "x"], "a pooling has no layers of BERT"),
        (["--model.connector.pretrained", "/nowhere"], "model.connector.pretrained /nowhere can't be loaded"),
        (["--model.vision.pretrained", "null"], "model.vision.frozen needs weights that can be had again"),
        (
            ["--data.max_text_length", "140"],
            "data.max_text_length 140 behind the 7 tokens of an image is more",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(
    work: Path, tmp_path: Path, more: list[str], error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match=re.escape(error)):
        run_ranks(1, train, options(work, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()
