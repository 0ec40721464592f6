"""Activation checkpointing changes memory, not numbers: losses and gradients to the bit, with dropout and without."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from model.build import build_classification, build_objective
from model.config import VisionConfig, objective_options
from model.frozen import freeze
from tests.tiny_flm import MAX_TEXT_LENGTH, VOCABULARY, caption, images, pair_rows, tiny_config

CASES = [
    ("default", "flm", 0.0),
    ("default", "flm", 0.2),
    ("released", "flm", 0.2),
    ("default", "mlm", 0.2),
    ("default", "ar", 0.0),
    ("default", "prefixlm", 0.2),
]
EFFICIENTNET = VisionConfig(name="timm/test_efficientnet", image_size=32)  # with batch normalisation


def objective_of(recompute: bool, behaviour="default", name="flm", dropout=0.0, vision=None, **reconstructor):
    torch.manual_seed(1)
    config = dataclasses.replace(tiny_config(behaviour, dropout, **reconstructor), activation_checkpointing=recompute)
    config.vision = vision or config.vision
    return build_objective(config, objective_options(name), VOCABULARY, MAX_TEXT_LENGTH).train()


def step(objective: nn.Module) -> tuple[list[Tensor], int]:
    """Losses and all gradients of a batch, and the bytes that were kept for backward."""
    batch = objective.planner(images(3), pair_rows([caption(4, 1), caption(9, 2), caption(1, 3)]))
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(2)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = list(objective(batch).values())
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    for parameter in parameters:
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    gradients = torch.autograd.grad(sum(losses), parameters, materialize_grads=True)
    return [*losses, *gradients, torch.rand(3)], sum(kept.values())  # the generator stands where it stood


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("behaviour", "name", "dropout"), CASES)
def test_losses_and_gradients_are_the_same_to_the_bit(behaviour: str, name: str, dropout: float) -> None:
    plain, kept = step(objective_of(False, behaviour, name, dropout))
    again, kept_less = step(objective_of(True, behaviour, name, dropout))
    assert_equal(again, plain)
    assert kept_less < 0.6 * kept


def test_a_shallower_reconstructor_and_two_images() -> None:
    options = {"bottom_layers": 1, "top_layers": 0}
    assert_equal(*(step(objective_of(recompute, dropout=0.2, **options))[0] for recompute in (True, False)))
    found = []
    for recompute in (True, False):
        config = dataclasses.replace(tiny_config(dropout=0.2), activation_checkpointing=recompute)
        torch.manual_seed(1)
        tail = (VOCABULARY, MAX_TEXT_LENGTH, "nlvr2", 2, 2)
        objective = build_classification(config, objective_options(), *tail).train()
        row = pair_rows([caption(4)])[0]
        rows = [dataclasses.replace(row, image=image, role="read", target=1) for image in range(2)]
        loss = objective(objective.planner(images(2).view(1, 2, 3, 32, 32), rows))["nlvr2"]
        found.append([loss, *torch.autograd.grad(loss, list(objective.parameters()))])
    assert_equal(*found)


def calls_of(module: nn.Module) -> list[int]:
    """Grows by one whenever the module runs."""
    calls: list[int] = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("vision", [None, EFFICIENTNET], ids=["clip", "timm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_tower_and_a_frozen_one(vision: VisionConfig | None, dtype: torch.dtype) -> None:
    """A trained tower runs twice, a frozen one once; running statistics stay as they are, unrounded in bf16."""
    for frozen in (False, True):
        results = []
        for recompute in (False, True):
            objective = objective_of(recompute, vision=vision)
            for name, buffer in objective.named_buffers():
                if "running" in name:
                    buffer.add_(torch.rand(buffer.shape, generator=torch.Generator().manual_seed(3)))
            for parameter in objective.parameters():
                parameter.data = parameter.data.to(dtype)
            if frozen:
                freeze(objective.net.vision, "somewhere")
            statistics = {name: value.clone() for name, value in objective.named_buffers()}
            inner = objective.net.vision.blocks[0] if vision is None else objective.net.vision.backbone.bn1
            calls, text_calls = calls_of(inner), calls_of(objective.net.bottom[0])
            results.append(step(objective)[0])
            assert len(calls) == 1 + (recompute and not frozen) and len(text_calls) == 1 + recompute
            for name, value in objective.named_buffers():
                assert value.dtype == statistics[name].dtype and torch.equal(value, statistics[name]), name
        assert_equal(*results)


def test_evaluation_runs_once() -> None:
    objective = objective_of(True).eval()
    calls = calls_of(objective.net.top[0])
    step(objective)
    with torch.no_grad():
        objective.train()(objective.planner(images(1), pair_rows([caption(4)])))
    assert len(calls) == 2


@pytest.mark.slow(30)
def test_it_compiles_as_one_graph() -> None:
    from model.cpu import door

    torch._dynamo.reset()
    config = dataclasses.replace(tiny_config(dropout=0.2), activation_checkpointing=True)
    config.vision.layers, config.text.bottom_layers, config.text.top_layers = 2, 1, 1  # further layers: the same code
    objective = build_objective(config, objective_options(), VOCABULARY, MAX_TEXT_LENGTH).double().train()
    compiled = torch.compile(objective, backend="aot_eager", fullgraph=True)
    batch = objective.planner(images(2), pair_rows([caption(4, 1), caption(9, 2)]))
    parameters = list(objective.parameters())
    results = []
    for function in (compiled, objective):
        torch.manual_seed(2)
        with door.shut():
            losses = list(function(batch).values())
            results.append([*losses, *torch.autograd.grad(sum(losses), parameters, materialize_grads=True)])
    for ours, theirs in zip(*results, strict=True):
        tolerance = 64 * 16 * torch.finfo(torch.float32).eps  # as in test_compile
        assert (ours - theirs).norm() <= tolerance * theirs.norm() + 1e-12
