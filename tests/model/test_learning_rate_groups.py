"""Every parameter is in the group that its module declares; one without a declaration is refused, not guessed at."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from model.learning_rate_groups import declare_group, declared_group
from model.weights.released import RELEASED_RULES
from model.weights.start import foreign_names
from pipeline.config.options import OptimConfig
from pipeline.engine.optim import parameter_groups
from tests.model.weights.test_released import released_objective
from tests.oracle import oracle_file
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


def test_groups_are_those_of_the_release() -> None:
    """Name by name; weight decay too, but for vectors, of which the release decays the vision tower's (NOTE)."""
    groups = json.loads(oracle_file("d_param_groups_tiny.json").read_text())
    fast = {name for group in groups if group["lr_multiplier"] == 5 for name in group["names"]}
    decayed = {name for group in groups if group["weight_decay"] for name in group["names"]}
    heads = {name for name in fast if name.startswith("lm_score")}
    objective, different = released_objective(), set()
    for ours, value in objective.named_parameters():
        for name in foreign_names(ours, RELEASED_RULES):
            expected = "head" if name in heads else "cross" if name in fast else "rest"
            assert objective.parameter_group(ours) == expected, name
            different |= {name} if objective.decays(ours, value) != (name in decayed) else set()
    vectors = {name for name in decayed if ".ln_" in name or name.endswith(("class_embedding", "token_type"))}
    table_of_one = "text_transformer.embeddings.token_type_embeddings.weight"  # a vector here
    assert different == {name for name in vectors if not name.startswith("vit_model.ln_final")} | {table_of_one}


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
