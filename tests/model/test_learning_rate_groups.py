"""Every parameter is in the group that its module declares; one without a declaration is refused, not guessed at."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model.learning_rate_groups import declare_group, declared_group
from pipeline.config.options import OptimConfig
from pipeline.engine.optim import parameter_groups
from tests.tiny_flm import tiny_flm

HEAD = ("lm_head", "itm_head")
CROSS = ("text_projection", "image_projection", "top", "reconstructor_bottom", "reconstructor_top", "pooler")


@pytest.mark.parametrize("behaviour", ["default", "released"])
@pytest.mark.parametrize("name", ["flm", "mlm", "ar", "prefixlm"])
def test_groups_are_the_papers(name: str, behaviour: str) -> None:
    """Specification section 7: five times the learning rate for heads, and for what is above the pretrained towers."""
    if (name, behaviour) == ("prefixlm", "released"):
        pytest.skip("prefixlm has no released behaviour")
    objective = tiny_flm(behaviour, name=name)
    for parameter, _ in objective.named_parameters():
        first, _, rest = parameter.partition(".")
        expected = "head" if first in HEAD else "cross" if rest.split(".")[0] in CROSS else "rest"
        assert objective.parameter_group(parameter) == expected, parameter


class Head(nn.Sequential):
    """A head that came later."""

    learning_rate_group = "head"


def test_a_new_head_learns_at_the_heads_rate_by_its_own_declaration() -> None:
    objective = tiny_flm()
    objective.vqa_head = Head(nn.Linear(32, 32), nn.Linear(32, 7))
    groups = parameter_groups(
        objective.named_parameters(), objective.parameter_group, objective.decays, OptimConfig(lr_mult_head=3.0)
    )
    for parameter in objective.vqa_head.parameters():
        (group,) = [group for group in groups if any(one is parameter for one in group["params"])]
        assert group["lr_mult"] == 3.0
    objective.vqa_head = nn.Linear(32, 7)
    with pytest.raises(ValueError, match=r"parameter vqa_head\.weight .* give its module a learning_rate_group"):
        parameter_groups(objective.named_parameters(), objective.parameter_group, objective.decays, OptimConfig())


def test_the_innermost_declaration_counts() -> None:
    root = nn.Module()
    root.tower = nn.Sequential(nn.Linear(2, 2), Head(nn.Linear(2, 2)))
    root.alone = nn.Parameter(torch.zeros(()))
    declare_group("rest", root.tower)
    assert [declared_group(root, f"tower.{name}") for name in ("0.weight", "1.0.weight")] == ["rest", "head"]
    with pytest.raises(ValueError, match="the parameter alone"):
        declared_group(root, "alone")
    root.learning_rate_group = "cross"
    assert declared_group(root, "alone") == "cross"
