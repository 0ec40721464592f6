"""Weights that are not trained are referred to by source and hash; a load sets an engine whatever it did before."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.frozen import freeze, frozen_tensors
from pipeline.checkpoint import restore
from pipeline.checkpoint.files import KINDS, CheckpointError, checkpoint_path, weights_hash
from pipeline.checkpoint.reading import Reader
from pipeline.checkpoint.saver import Saver
from pipeline.checkpoint.state import RunState
from pipeline.config.options import Config
from tests.forked_ranks import run_ranks
from tests.pipeline.engine.test_engine import global_loss, make_engine, micro_batches, tiny_config
from tests.tiny_objective import WIDTH, TinyObjective, tiny_batch

FROZEN_TOWER = [
    "batch_norm.bias",
    "batch_norm.num_batches_tracked",
    "batch_norm.running_mean",
    "batch_norm.running_var",
]
FROZEN_TOWER += ["batch_norm.weight", "bias", "weight"]
FROZEN = [*(f"image.{name}" for name in FROZEN_TOWER), "norm.bias", "norm.weight"]


class Tower(nn.Linear):
    """What must not move in training: batch statistics and dropout."""

    def __init__(self) -> None:
        super().__init__(3, WIDTH)
        self.batch_norm, self.dropout = nn.BatchNorm1d(WIDTH), nn.Dropout(0.5)

    def forward(self, colours: Tensor) -> Tensor:
        return self.dropout(self.batch_norm(super().forward(colours)))


class PartlyFrozen(TinyObjective):
    """The stand-in with a frozen tower, from a source that gives the same weights every time, or others."""

    def __init__(self, source: str = "tower-v1", shift: float = 0.0, frozen: tuple[str, ...] = ("image", "norm")):
        super().__init__()
        self.image = Tower()
        generator = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for tensor in [*self.image.parameters(), *self.image.buffers()]:
                if tensor.is_floating_point():
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5 + shift)
        for name in frozen:
            freeze(getattr(self, name), source)


def train(place, config: Config, stage: int, run: Path, stop: int, objective) -> list[float]:
    engine, agreement = make_engine(place, config, stage, objective)
    state = restore.resume(run, engine, agreement, place.is_main) or RunState()
    saver = Saver(run, engine, config.train, place, agreement)
    losses = []
    for step in range(state.step, stop):
        losses.append(global_loss(engine, agreement, engine.step(step, micro_batches(config, place, step))))
    assert saver.save(RunState(step=stop)) and saver.wait()
    return losses


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "world_size"), [(0, 1), (3, 2)])
def test_frozen_weights_are_referred_to(tmp_path: Path, stage: int, world_size: int) -> None:
    config = tiny_config()
    run_ranks(world_size, train, config, stage, tmp_path, 2, PartlyFrozen)
    path = checkpoint_path(tmp_path, 2)
    state = restore.read_state(path)
    model = PartlyFrozen()
    tower = {name: value for name, value in model.state_dict().items() if name in FROZEN}
    assert state.frozen == {"source": "tower-v1", "names": FROZEN, "sha256": weights_hash(tower)}
    reader = Reader(path)
    assert not {name for kind in KINDS for name in reader.shapes(kind)} & set(FROZEN)

    with pytest.raises(CheckpointError, match="9 frozen ones of tower-v1"):
        restore.load_weights(path)
    with pytest.raises(CheckpointError, match="frozen weights: missing norm.bias, norm.weight"):
        restore.load_weights(path, {name: tower[name] for name in FROZEN[:-2]})
    model.load_state_dict(restore.load_weights(path, tower))

    run_ranks(world_size, train, config, stage, tmp_path, 4, PartlyFrozen)
    other, less = (lambda: PartlyFrozen("tower-v2", 0.5)), (lambda: PartlyFrozen(frozen=("image",)))
    other_tower = {name: value for name, value in other().state_dict().items() if name in FROZEN}
    messages = run_ranks(1, refusals, config, stage, path, [other, less, TinyObjective])[0]
    assert f"frozen weights of tower-v1 with SHA-256 {state.frozen['sha256']}" in messages[0]
    assert f"found tower-v2 with {weights_hash(other_tower)}" in messages[0]
    assert "frozen weights: missing norm.bias, norm.weight;" in messages[1]
    assert "frozen weights: missing image.batch_norm.bias, " in messages[2] and " and 6 more;" in messages[2]


def refusals(place, config: Config, stage: int, path: Path, objectives: list) -> list[str]:
    """What loading the checkpoint into an engine of each objective says."""
    messages = []
    for objective in objectives:
        engine, _ = make_engine(place, config, stage, objective)
        with pytest.raises(CheckpointError) as error:
            restore.load(path, engine)
        messages.append(str(error.value))
    return messages


def what_training_does(place, config: Config, stage: int, run: Path) -> dict[str, Any]:
    """Three steps and a checkpoint of a model of which only rank 0 was given the frozen weights."""
    seen: list[tuple[Tensor, Tensor]] = []

    def objective() -> PartlyFrozen:
        built = PartlyFrozen(shift=0.0 if place.is_main else 0.7)
        built.image.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
        return built

    engine, agreement = make_engine(place, config, stage, objective)
    for step in range(2):
        engine.step(step, micro_batches(config, place, step))
    with engine.scoring() as score:
        score(PartlyFrozen.score, tiny_batch([0, 1, 2]))
    losses = [global_loss(engine, agreement, engine.step(2, micro_batches(config, place, 2)))]
    saver = Saver(run, engine, config.train, place, agreement)
    assert saver.save(RunState(step=3)) and saver.wait()
    model = engine.objective
    modes = {name for name, module in model.named_modules() if module.training}
    stepped = [name for name, _ in engine.named_state()]
    with _whole([value for value in model.parameters() if not value.requires_grad]):
        weights = {name: value.detach().float().clone().numpy() for name, value in frozen_tensors(model).items()}
    gradients = [name for name, value in model.named_parameters() if name in weights and value.grad is not None]
    outputs = [
        (colours.float().numpy(), output.detach().float().numpy(), output.requires_grad) for colours, output in seen
    ]
    return {
        "losses": losses,
        "training": modes,
        "stepped": stepped,
        "frozen": weights,
        "gradients": gradients,
        "outputs": outputs,
    }


def _whole(parameters: list[nn.Parameter]):
    import deepspeed

    is_divided = hasattr(parameters[0], "ds_id")
    return deepspeed.zero.GatheredParameters(parameters) if is_divided else nullcontext()


@pytest.mark.slow
def test_a_frozen_tower_does_not_move_at_any_stage(tmp_path: Path) -> None:
    """Dropout and batch statistics stay off in the forward passes of training, compared with the closed form; every
    rank has rank 0's weights and buffers; and every stage trains the same model."""
    expected = PartlyFrozen()
    tower = {name: value.double() for name, value in expected.image.state_dict().items()}
    losses = []
    for stage in range(4):
        for found in run_ranks(2, what_training_does, tiny_config(), stage, tmp_path / str(stage)):
            assert {name.split(".")[0] for name in found["training"]} == {
                "",
                "embedding",
                "cross",
                "dropout",
                "head",
                "odd",
            }
            assert not {*FROZEN} & {*found["stepped"]} and found["gradients"] == []
            for name, value in frozen_tensors(expected).items():
                assert torch.equal(torch.as_tensor(found["frozen"][name]), value.float()), (stage, name)
            assert len(found["outputs"]) == 3 * 2 + 1
            for colours, output, requires_grad in found["outputs"]:
                linear = torch.from_numpy(colours).double() @ tower["weight"].T + tower["bias"]
                scaled = (linear - tower["batch_norm.running_mean"]) / (tower["batch_norm.running_var"] + 1e-5).sqrt()
                closed = scaled * tower["batch_norm.weight"] + tower["batch_norm.bias"]
                torch.testing.assert_close(torch.from_numpy(output).double(), closed, rtol=1e-5, atol=1e-5)
                assert not requires_grad, "activations are kept for a backward pass that is never made"
            losses.append(found["losses"])
    assert all(found == pytest.approx(losses[0], abs=1e-5) for found in losses)
    for stage, (other_stage, world_size) in enumerate([(3, 1), (2, 2), (0, 1), (1, 2)]):
        found = run_ranks(world_size, train, tiny_config(), other_stage, tmp_path / str(stage), 5, PartlyFrozen)
        losses.append(found[0])
    assert all(found == pytest.approx(losses[-1], abs=1e-5) for found in losses[-4:])


def test_frozen_is_frozen_whatever_is_called() -> None:
    model = PartlyFrozen().train()
    model.image.train()
    for module in model.image.modules():
        module.train()
    twin = copy.deepcopy(model).train()
    for one in (model, twin):
        assert one.training and one.head.training
        assert not any(module.training for module in [*one.image.modules(), one.norm])
    assert twin.image.train() is twin.image, "a copy speaks for itself"
    assert frozen_tensors(model).keys() == {*FROZEN} and not model.image.weight.requires_grad


class OneMore(TinyObjective):
    def __init__(self) -> None:
        super().__init__()
        self.extra = torch.nn.Parameter(torch.zeros(3))


class OneLess(TinyObjective):
    def __init__(self) -> None:
        super().__init__()
        del self.odd


class OtherShape(TinyObjective):
    def __init__(self) -> None:
        super().__init__()
        self.odd = torch.nn.Linear(1, 5)  # the shape on file could be broadcast into it or it into that


@pytest.mark.slow
def test_loading_is_strict(tmp_path: Path) -> None:
    config = tiny_config()
    run_ranks(1, train, config, 1, tmp_path, 1, TinyObjective)
    messages = run_ranks(1, refusals, config, 1, checkpoint_path(tmp_path, 1), [OneMore, OneLess, OtherShape])[0]
    assert "weight: missing extra; it belongs to another model" in messages[0]
    assert "weight: unexpected odd.bias, odd.weight; it belongs to another model" in messages[1]
    assert "weight of odd.weight has shape [5, 12], the model's [5, 1]" in messages[2]


def go_back_and_forth(place, config: Config, stage: int, run: Path) -> tuple[list[list[float]], list[int], list[str]]:
    """Losses of steps 0-5, then of the same steps after loading what was saved before step 3 and before step 0."""
    engine, agreement = make_engine(place, config, stage, lambda: TinyObjective(0.3))
    saver = Saver(run, engine, config.train, place, agreement)
    saved = {0, 3}

    def go(first: int) -> list[float]:
        losses = []
        for step in range(first, 6):
            if step in saved and first == 0:
                saver.save(RunState(step=step, skipped_steps=step))
            losses.append(global_loss(engine, agreement, engine.step(step, micro_batches(config, place, step))))
            saver.advance(agreement.total(saver.votes())[0])
        assert saver.wait()
        return losses

    def fingerprint() -> str:
        tensors = {f"{kind} {name}": t for name, held in engine.named_state() for kind, t in held.items()}
        return weights_hash(tensors)

    found, steps, hashes = [go(0)], [], [fingerprint()]
    saved.clear()
    for first in (3, 0, 3):
        state = restore.load(checkpoint_path(run, first), engine)
        assert (state.step, engine.skipped_steps) == (first, first)
        steps.append(engine.optimizer_steps)
        found.append(go(first))
        hashes.append(fingerprint())
    return found, steps, hashes


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (3, "bf16")])
def test_an_engine_that_has_stepped_can_be_set_back(tmp_path: Path, stage: int, precision: str) -> None:
    """Bit for bit, weights and moments included; the checkpoint of step 0 has no moments."""
    for found, steps, hashes in run_ranks(2, go_back_and_forth, tiny_config(precision=precision), stage, tmp_path):
        assert found[1] == found[3] == found[0][3:]
        assert found[2] == found[0]
        assert steps == [3, 0, 3] and len(set(hashes)) == 1
