"""A frozen vision tower through the programs: trained beside, resumed, evaluated, captioned, replayed, started from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from model.build import build_objective
from model.config import FLMOptions
from model.frozen import frozen_tensors
from model.weights.start import foreign_names
from model.weights.towers import CLIP_RULES
from pipeline.checkpoint.files import checkpoint_path
from pipeline.checkpoint.reading import Reader
from pipeline.checkpoint.restore import CheckpointError, load_weights, read_state
from pipeline.config.command_line import load_config
from pipeline.config.options import ConfigError
from pipeline.data.tokenizer import load_tokenizer
from pipeline.distributed.places import Place
from pipeline.distributed.ranks import Agreement
from pipeline.evaluate import main as evaluate
from pipeline.generate import main as generate
from pipeline.incidents.records import read_incident
from pipeline.replay import main as replay
from pipeline.weights.sources import read_model
from pipeline.weights.starting import load_starting_weights
from tests.forked_ranks import run_ranks
from tests.pipeline.data.test_reader import records, write_split
from tests.pipeline.data.test_tokenizer import write_tokenizer
from tests.pipeline.weights.test_starting_weights import other_numbers
from tests.program.test_incidents import train
from tests.tiny_frozen_parts import write_clip

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS, BLOCKS = 4, 2  # the last block is not part of the tower


def options(output: Path, clip: Path, *more: str) -> list[str]:
    settings = {
        "recipe": "flm_tiny",
        "data": output.parent / "data",
        "output": output,
        "model.vision.pretrained": clip,
        "model.vision.frozen": "true",
        "data.eval_split": "dev",
        "optim.batch_size": 8,
        "optim.micro_batch_size": 2,
        "train.steps": STEPS,
        "train.save_every": 1,
        "train.keep_last": 9,
        "train.eval_every": 0,
        "train.log_every": 1,
        "guard.warmup_steps": 1,
        "guard.loss_sigmas": 1e-6,
        "optim.learning_rate": 1.0,  # too large: a spike follows, so that there is something to replay
        "optim.warmup_fraction": 0,
        "guard.max_skips": 9,
        "tracking.tensorboard": "false",
        "tracking.report": "false",
    }
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))] + list(more)


def zero(stage: int) -> list[str]:
    return ["--deepspeed", str(REPOSITORY / "ds_configs" / f"zero{stage}.json")]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a CLIP file, and a run of two ranks with that tower, frozen."""
    work = tmp_path_factory.mktemp("work")
    rows = records(40)
    write_split(work / "data" / "toy" / "train", rows)
    write_split(work / "data" / "toy" / "dev", rows[:8])
    load_tokenizer(write_tokenizer(work / "data" / "tokenizer"))  # imports what every fork then has
    clip = write_clip(work / "clip.safetensors")
    assert run_ranks(
        2, train, options(work / "run", clip, "--deepspeed", str(REPOSITORY / "ds_configs" / "zero2.json"))
    ) == [0, 0]
    return work


def is_clips(tower: dict[str, torch.Tensor], clip: Path) -> bool:
    theirs = load_file(clip)
    expected = {name: theirs[f"visual.{foreign_names(name, CLIP_RULES)[0]}"] for name in tower}
    return all(torch.equal(tower[name], value) for name, value in expected.items())


@pytest.mark.slow
def test_the_checkpoint_refers_to_the_tower_and_every_program_loads_it(work: Path, tmp_path: Path, capsys) -> None:
    run = work / "run"
    path = checkpoint_path(run, STEPS)
    frozen = read_state(path).frozen
    assert frozen["source"] == str(work / "clip.safetensors") and all("net.vision." in name for name in frozen["names"])
    reader = Reader(path)
    assert reader.shapes("weight") and not any("vision" in name for name in reader.shapes("weight"))
    noted = json.loads((run / "environment.json").read_text())["starting_weights"]["vision"]
    assert noted["taken"] == str(work / "clip.safetensors") and len(noted["names"]["loaded"]) == len(frozen["names"])
    assert all("resblocks.1." in name for name in noted["names"]["dropped"])
    whole = read_model(str(run))
    tower = {name.removeprefix("net.vision."): value for name, value in whole.items() if "vision" in name}
    assert is_clips(tower, work / "clip.safetensors")

    assert evaluate(["--run", str(run)]) == 0
    assert json.loads(capsys.readouterr().out)["flm_loss"] > 0
    Image.new("RGB", (40, 40), "red").save(tmp_path / "picture.png")
    assert generate(["--run", str(run), str(tmp_path / "picture.png")]) == 0
    incidents = sorted((run / "incidents").glob("step_*"))
    assert read_incident(incidents[0])["checkpoint"] is not None
    assert replay([str(incidents[0])]) == 0
    assert "losses: bit-equal to the record" in capsys.readouterr().out


@pytest.mark.slow
def test_a_resume_loads_the_tower_again_on_any_topology(work: Path, tmp_path: Path) -> None:
    run = shutil.copytree(work / "run", work / "resumed")
    longer = [*zero(3), "--train.steps", str(STEPS + 1)]
    assert run_ranks(1, train, options(run, work / "clip.safetensors", *longer)) == [0]
    before, after = (read_state(checkpoint_path(one, step)) for one, step in ((work / "run", STEPS), (run, STEPS + 1)))
    assert before.frozen == after.frozen
    other = write_clip(tmp_path / "other.safetensors", seed=1)
    for clip, message in (
        (other, "frozen weights of .*found .*other.safetensors"),
        (tmp_path / "gone", "no such file"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run_ranks(1, train, options(run, clip, "--train.steps", str(STEPS + 2)))


@pytest.mark.slow
@pytest.mark.parametrize("source", ["run", "run/checkpoints/step_00000002"])
def test_a_fine_tune_starts_from_a_run_with_other_heads(work: Path, tmp_path: Path, source: str) -> None:
    """Its frozen tower comes too, the heads that only one of the two has are named; another vocabulary is refused."""
    config = load_config(work / "run")
    config.model.weights, config.model.vision.frozen = str(work / source), False
    config.model.vision.image_size = 48
    tokenizer = load_tokenizer(work / "data" / "tokenizer")
    objective = build_objective(config.model, FLMOptions(), tokenizer.vocabulary, 20)
    del objective.lm_head
    objective.vqa_head = torch.nn.Linear(32, 7)
    before = objective.vqa_head.weight.clone()
    alone = (Place(0, 1, 0, "single"), Agreement())
    found = load_starting_weights(objective, config.model, tokenizer, *alone)["model"]["names"]
    assert found["fresh"] == ["vqa_head.weight", "vqa_head.bias"] and torch.equal(objective.vqa_head.weight, before)
    assert found["resized"] == ["net.vision.position_embedding"]
    assert found["dropped"] and all(name.startswith("lm_head.") for name in found["dropped"])
    expected = read_model(config.model.weights)
    own = dict(objective.named_parameters())
    assert all(torch.equal(own[name], expected[name]) for name in found["loaded"] if name not in found["resized"])
    assert {*found["loaded"], *found["fresh"]} == set(own)

    other = other_numbers(tmp_path / "other", 265)
    with pytest.raises(ConfigError, match=r"model\.weights .*is token 265 here, 266 there.*use --data\.tok"):
        load_starting_weights(objective, config.model, other, *alone)
    del objective.net.pooler
    with pytest.raises(ConfigError, match=r"model\.weights .*the model has no place for net\.pooler\.dense\.bias"):
        load_starting_weights(objective, config.model, tokenizer, *alone)


@pytest.mark.slow
def test_a_run_that_starts_from_a_run_can_keep_its_tower_frozen(work: Path) -> None:
    run = work / "second"
    weights = ["--model.weights", str(work / "run")]
    assert run_ranks(1, train, options(run, work / "clip.safetensors", *weights, "--train.steps", "2")) == [0]
    state = read_state(checkpoint_path(run, 2))
    assert state.frozen["source"] == str(work / "run")
    assert state.frozen["sha256"] == read_state(checkpoint_path(work / "run", STEPS)).frozen["sha256"]
    assert evaluate(["--run", str(run)]) == 0


@pytest.mark.slow
def test_a_frozen_tower_without_weights_that_can_be_had_again_is_refused(work: Path) -> None:
    config = load_config(work / "run")
    vocabulary = load_tokenizer(work / "data" / "tokenizer").vocabulary
    for pretrained in (None, "auto"):
        config.model.vision.pretrained = pretrained
        with pytest.raises(ValueError, match=r"model\.vision\.frozen needs weights that can be had again, found"):
            build_objective(config.model, config.objective, vocabulary, 20)
    config.model.vision.pretrained = "clip.safetensors"
    objective = build_objective(config.model, config.objective, vocabulary, 20)
    assert frozen_tensors(objective).keys() == {
        f"net.vision.{name}" for name, _ in objective.net.vision.named_parameters()
    }
    with pytest.raises(CheckpointError, match="frozen ones of"):
        load_weights(work / "run")
