"""A run with a convolutional tower of timm: it trains, resumes on its losses at another ZeRO stage, and captions."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from model.build import build_objective
from model.config import VisionConfig, objective_options
from model.torchvision_shim import ensure_torchvision
from pipeline.checkpoint.restore import load_weights
from pipeline.recording.run_log import read_log
from tests.forked_ranks import run_ranks
from tests.pipeline.engine.test_engine import global_loss, make_engine, micro_batches
from tests.pipeline.engine.test_engine import tiny_config as engine_config
from tests.program.test_program import REPOSITORY, SHORT, finish, losses, program
from tests.tiny_corpus import make_corpus
from tests.tiny_flm import VOCABULARY, flm_batch, tiny_config

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """ImageNet-like weights in a file, with statistics that are not those of a fresh network."""
    ensure_torchvision()
    import timm

    torch.manual_seed(0)
    state = timm.create_model("tf_efficientnet_lite0").state_dict()
    for name, value in state.items():
        if name.endswith(STATISTICS[:2]):
            value.add_(torch.rand_like(value) / 4)
    torch.save({"state_dict": state}, folder / "efficientnet.pt")
    return state


@pytest.mark.slow(25)
def test_an_efficientnet_trains_resumes_and_captions(tmp_path: Path) -> None:
    corpus, given = make_corpus(tmp_path / "data", 64, 8), weights_of(tmp_path)
    options = [*SHORT, "--data", corpus, "--train.eval_every", "0"]
    options += [
        "--train.steps",
        "6",
        "--train.save_every",
        "3",
        "--train.keep_last",
        "9",
        "--optim.learning_rate",
        "3e-3",
    ]
    options += ["--model.vision.name", "timm/tf_efficientnet_lite0", "--model.vision.image_size", "64"]
    options += ["--model.vision.pretrained", tmp_path / "efficientnet.pt", "--train.eval_samples", "8"]
    configurations = [REPOSITORY / "ds_configs" / f"zero{stage}.json" for stage in (1, 2)]
    whole, part = tmp_path / "whole", tmp_path / "part"
    done = finish(program(*options, "--deepspeed", configurations[0], "--output", whole), tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"starting weights: vision {tmp_path / 'efficientnet.pt'}" in done.stdout
    by_step = losses(whole)
    assert by_step[6] < by_step[1]

    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints" / "step_00000006")
    done = finish(program(*options, "--deepspeed", configurations[1], "--output", part), tmp_path)
    assert done.returncode == 0 and "continuing after step 3 of 6" in done.stdout, done.stderr
    assert losses(part) == by_step
    trained, resumed = load_weights(whole), load_weights(part)
    assert all(torch.equal(resumed[name], value) for name, value in trained.items())
    tower = {name: value for name, value in given.items() if not name.startswith("classifier")}
    ours = {name.removeprefix("net.vision.backbone."): v for name, v in trained.items() if "net.vision." in name}
    assert set(ours) == set(tower), "the tower is in the checkpoint under timm's names, statistics included"
    for name, value in tower.items():
        assert ours[name].dtype == value.dtype
        assert torch.equal(ours[name], value) == name.endswith(STATISTICS), name
    assert all(record["gflop_per_sample"] > 0 for record in read_log(whole / "log.jsonl") if record["kind"] == "train")

    command = [sys.executable, "-m", "pipeline.generate", "--run", whole, "--data", corpus, "--samples", "2"]
    done = finish(list(map(str, command)), REPOSITORY)
    assert done.returncode == 0 and "captions: 2" in done.stdout, done.stderr


def train_frozen(place, stage: int) -> tuple[list[float], list[str], list[str]]:
    """Losses of an engine whose tower is frozen, what of the model moved, and the names whose state it holds."""

    def objective() -> torch.nn.Module:
        config = tiny_config()
        config.vision = VisionConfig(name="timm/test_efficientnet", image_size=32)
        built = build_objective(config, objective_options(corruption_rate=0.4), VOCABULARY, 24)
        built.net.vision.requires_grad_(False)
        return built

    config = engine_config()
    engine, agreement = make_engine(place, config, stage, objective)
    before = {name: value.clone() for name, value in engine.objective.state_dict().items()}
    found = []
    for step in range(4):
        batches = micro_batches(config, place, step, flm_batch)
        found.append(global_loss(engine, agreement, engine.step(step, batches)))
    after = engine.objective.state_dict()
    moved = [name for name, value in after.items() if not torch.equal(before[name], value)]
    return found, moved, [name for name, _ in engine.named_state()]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_a_frozen_efficientnet_stays_as_it_is(stage: int) -> None:
    """Its weights and its running statistics, while the rest trains; no optimizer state of it is kept."""
    found, moved, held = run_ranks(1, train_frozen, stage)[0]
    assert found[3] < found[0]
    assert moved and not any(name.startswith("net.vision.") for name in moved)
    assert not any(name.startswith("net.vision.") and name.endswith(("weight", "bias")) for name in held)
