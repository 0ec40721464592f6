"""A fresh run with a tower of another library: rank 0 finds its weights, buffers included, and every rank gets them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.build import build_objective
from model.config import ModelConfig, VisionConfig, objective_options
from model.torchvision_shim import ensure_torchvision
from pipeline.data.tokenizer import load_tokenizer
from pipeline.distributed.places import Place
from pipeline.distributed.ranks import Agreement
from pipeline.weights.hub import HubError
from pipeline.weights.starting import describe_start, load_starting_weights
from tests.forked_ranks import run_ranks
from tests.pipeline.data.test_tokenizer import write_tokenizer
from tests.pipeline.engine.test_engine import make_engine
from tests.pipeline.engine.test_engine import tiny_config as engine_config
from tests.tiny_flm import tiny_config

NAME, REPOSITORY = "timm/test_efficientnet", "timm/test_efficientnet.r160_in1k"
ALONE = Place(0, 1, 0, "single")


class FakeHub:
    """One repository in a local folder, or none."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def folder(self, repository: str, *names: str) -> Path:
        assert (repository, names) == (REPOSITORY, ("model.safetensors",))
        if self._folder is None:
            raise HubError("not in the local cache, and the hub does not answer (no route)")
        return self._folder


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the weights and a tokenizer; the statistics are not those of a fresh network."""
    from safetensors.torch import save_file

    ensure_torchvision()
    import timm

    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(9)
    state = timm.create_model("test_efficientnet").state_dict()
    statistics = {name: torch.rand_like(value) for name, value in state.items() if "running" in name}
    save_file(state | statistics, folder / "model.safetensors")
    write_tokenizer(folder / "tokenizer")
    return folder


def config_of(pretrained: str | None) -> ModelConfig:
    config = tiny_config()
    config.vision = VisionConfig(name=NAME, pretrained=pretrained, image_size=32)
    return config


def start(place: Place, folder: Path, hub: FakeHub | None, pretrained: str = "auto"):
    """The objective, and what was found."""
    tokenizer, config = load_tokenizer(folder / "tokenizer"), config_of(pretrained)
    torch.manual_seed(place.rank)  # so that nothing is equal by chance
    objective = build_objective(config, objective_options(), tokenizer.vocabulary, 24)
    return objective, load_starting_weights(objective, config, tokenizer, place, Agreement(), hub)


def test_auto_takes_what_the_library_takes(published: Path) -> None:
    objective, found = start(ALONE, published, FakeHub(published))
    assert found["vision"]["taken"] == f"{NAME} ({published / 'model.safetensors'})"
    assert objective.net.vision.backbone.bn1.running_mean.abs().sum() > 0
    _, found = start(ALONE, published, FakeHub(None))
    line, warnings = describe_start(found)
    assert line == "starting weights: vision random, text random"
    assert "the hub does not answer (no route)" in warnings[0]


def state_of_rank(place: Place, stage: int, folder: Path) -> dict:
    engine, _ = make_engine(place, engine_config(), stage, lambda: start(place, folder, FakeHub(folder))[0])
    return {name: value["weight"].numpy() for name, value in engine.named_state() if "net.vision" in name}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_running_statistics_reach_every_rank(published: Path, stage: int) -> None:
    from safetensors.torch import load_file

    given = load_file(published / "model.safetensors")
    for state in run_ranks(2, state_of_rank, stage, published):
        names = {name.removeprefix("net.vision.backbone."): value for name, value in state.items()}
        assert {"bn1.running_mean", "bn1.num_batches_tracked", "conv_stem.weight"} <= set(names)
        assert all(torch.equal(torch.from_numpy(value), given[name]) for name, value in names.items())
