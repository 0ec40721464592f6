"""At ZeRO-3 a model is built by rank 0 and sent in parts: the same model, and no other rank ever holds it whole."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.checkpoint.files import weights_hash
from pipeline.deepspeed_json.ds_config import read_ds_config, resolve
from pipeline.distributed.places import Place
from pipeline.distributed.ranks import Agreement
from pipeline.engine.engine import TrainEngine, build_device, prepare_deepspeed
from tests.forked_ranks import run_ranks
from tests.pipeline.checkpoint.test_frozen import PartlyFrozen
from tests.pipeline.engine.test_engine import CPU, REPOSITORY, tiny_config
from tests.tiny_flm import tiny_flm
from tests.tiny_objective import TinyObjective

OBJECTIVES = {"flm": lambda: tiny_flm(seed=3, spread=0.4, corruption_rate=0.4), "frozen": PartlyFrozen}


def ds_config_of(config, world_size: int) -> dict:
    return resolve(read_ds_config(REPOSITORY / "ds_configs" / "zero3.json"), config, world_size, CPU)


def build(place: Place, config, objective, change) -> tuple[nn.Module, TrainEngine]:
    prepare_deepspeed(torch.device("cpu"))
    torch.manual_seed(3)
    ds_config = ds_config_of(config, place.world_size)
    with build_device(ds_config, place):
        built = objective()
    assert all(value.is_meta != place.is_main for value in (*built.parameters(), *built.buffers()))
    if place.is_main:
        change(built)
    return built, TrainEngine(built, ds_config, config.optim, config.train, place, Agreement())


@torch.no_grad()
def start(model: nn.Module) -> None:
    """What starting weights do, on rank 0 alone."""
    next(model.parameters()).add_(0.125)


def state_of_a_build(place: Place, config, name: str) -> dict[str, str]:
    import deepspeed

    built, engine = build(place, config, OBJECTIVES[name], start)
    with deepspeed.zero.GatheredParameters(list(built.parameters())):
        return hashes(built) | {"masters": weights_hash({n: held["weight"] for n, held in engine.named_state()})}


def hashes(model: nn.Module) -> dict[str, str]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: weights_hash({name: value}) for name, value in tensors}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(OBJECTIVES))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_is_the_model_that_is_built_whole(precision: str, name: str) -> None:
    """Parameters, frozen ones and buffers, bit for bit; masters of what is trained."""
    torch.manual_seed(3)
    expected = OBJECTIVES[name]()
    start(expected)
    for parameter in expected.parameters():
        parameter.data = parameter.data.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    trained = {n: value.float() for n, value in expected.named_parameters() if value.requires_grad}
    from model.frozen import trained_buffers

    masters = weights_hash(trained | dict(trained_buffers(expected)))
    for found in run_ranks(2, state_of_a_build, tiny_config(precision=precision), name):
        assert found == hashes(expected) | {"masters": masters}


class Alive(TorchDispatchMode):
    """The most bytes of tensors with values that were alive at one time, each storage counted once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self._sizes = 0, {}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._sizes:
                    self._sizes[key] = storage.nbytes()
                    weakref.finalize(storage, self._sizes.pop, key, None)
                self.peak = max(self.peak, sum(self._sizes.values()))
        return result


class Wide(TinyObjective):
    """A stand-in of many equal layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(64))


def peak_of_a_build(place: Place, config) -> tuple[int, int]:
    """The most bytes alive while the model is built and divided, and those of the largest parameter."""
    from pipeline.engine import engine

    prepare_deepspeed(torch.device("cpu"))
    ds_config = ds_config_of(config, place.world_size)
    with Alive() as alive:
        with build_device(ds_config, place):
            built = Wide()
        largest = 4 * max(value.numel() for value in built.parameters())
        engine._divide(built, ds_config)
    return alive.peak, largest


@pytest.mark.slow
def test_no_other_rank_holds_it_whole() -> None:
    """Alive at most: this rank's part of all parameters, and one whole with the copies made in sending it."""
    whole = 4 * sum(value.numel() for value in Wide().parameters())
    (first, _), *others = run_ranks(4, peak_of_a_build, tiny_config(micro=1))
    assert first >= whole, "the census does not see tensors"
    for peak, largest in others:
        assert whole / 4 <= peak <= whole / 4 + 4 * largest < 0.4 * whole, (peak / whole, largest / whole)
