"""Learning-rate schedule in closed form, and parameter groups with total coverage."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.config.options import OptimConfig
from pipeline.engine.optim import build_adamw, learning_rate, parameter_groups, set_learning_rate
from tests.tiny_objective import TinyObjective


def test_linear_schedule_is_the_papers() -> None:
    """Warm-up over 5 % of 30,000 steps from 0, then linear to 0, as transformers' get_linear_schedule_with_warmup."""
    optim = OptimConfig()
    for step in (0, 1, 750, 1500, 1501, 15_750, 29_999, 30_000):
        expected = step / 1500 if step < 1500 else (30_000 - step) / 28_500
        assert learning_rate(step, 30_000, optim) == pytest.approx(8e-5 * expected, rel=1e-12)


def test_other_schedules() -> None:
    cosine = OptimConfig(schedule="cosine", learning_rate=1.0, end_lr=0.2, warmup_fraction=0.0)
    for step in (0, 3, 10):
        expected = 0.2 + 0.8 * (1 + math.cos(math.pi * step / 10)) / 2
        assert learning_rate(step, 10, cosine) == pytest.approx(expected)
    constant = OptimConfig(schedule="constant", learning_rate=1.0, warmup_fraction=0.2)
    assert [learning_rate(step, 10, constant) for step in range(4)] == [0, 0.5, 1, 1]


def test_warm_up_never_ends_when_it_is_all_there_is() -> None:
    optim = OptimConfig(warmup_fraction=1.0, learning_rate=1.0)
    assert [learning_rate(step, 4, optim) for step in range(5)] == [0, 0.25, 0.5, 0.75, 1.0]


def test_every_parameter_is_in_one_group() -> None:
    model = TinyObjective()
    model.embedding.weight.requires_grad_(False)
    groups = parameter_groups(model.named_parameters(), model.parameter_group, model.decays, OptimConfig())
    seen = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(seen) == len(set(seen))
    assert set(seen) == {id(p) for p in model.parameters() if p.requires_grad}
    by_name = {group["name"]: group for group in groups}
    assert set(by_name) == {"rest", "rest_no_decay", "cross", "cross_no_decay", "head", "head_no_decay"}
    assert by_name["head"]["lr_mult"] == 5 and by_name["rest"]["lr_mult"] == 1
    assert by_name["head"]["weight_decay"] == 0.01 and by_name["head_no_decay"]["weight_decay"] == 0
    set_learning_rate(groups, 2.0)
    assert by_name["cross"]["lr"] == 10 and by_name["rest"]["lr"] == 2


def test_the_vision_tower_may_have_a_rate_of_its_own() -> None:
    """Alone of all parameters, in whatever group they are; at 1 the groups are those without it."""
    tower = {"net.vision.blocks.0.weight": "rest", "net.vision.blocks.0.bias": "rest", "net.vision.gate": "cross"}
    others = {"net.top.weight": "cross", "net.embedding.weight": "rest", "net.visionary.weight": "rest"}
    named = {name: torch.nn.Parameter(torch.ones(1)) for name in [*tower, *others]}
    decays = lambda name, _: not name.endswith("bias")  # noqa: E731
    group_of = (tower | others).__getitem__
    groups = parameter_groups(named.items(), group_of, decays, OptimConfig(lr_mult_vision=0.1, lr_mult_cross=5.0))
    set_learning_rate(groups, 2.0)
    names = {id(parameter): name for name, parameter in named.items()}
    rates = {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}
    of_group = {"rest": 2.0, "cross": 10.0}
    expected = {name: of_group[group] * (0.1 if name in tower else 1.0) for name, group in (tower | others).items()}
    assert rates == pytest.approx(expected)
    of_tower = {"rest_vision", "rest_vision_no_decay", "cross_vision"}
    assert {group["name"] for group in groups} == {"rest", "cross", *of_tower}
    plain = parameter_groups(named.items(), group_of, decays, OptimConfig())
    assert [group["name"] for group in plain] == ["rest", "rest_no_decay", "cross"]


def test_unknown_group_is_refused() -> None:
    model = TinyObjective()
    with pytest.raises(ValueError, match="is in group 'tail'; expected one of rest, cross, head"):
        parameter_groups(model.named_parameters(), lambda name: "tail", model.decays, OptimConfig())


def test_adamw_takes_the_recipe() -> None:
    model = TinyObjective()
    optim = OptimConfig(betas=(0.5, 0.6), eps=1e-3)
    groups = parameter_groups(model.named_parameters(), model.parameter_group, model.decays, optim)
    optimizer = build_adamw(groups, optim)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert all(group["betas"] == (0.5, 0.6) and group["eps"] == 1e-3 for group in optimizer.param_groups)
