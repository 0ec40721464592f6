"""Which learning rate a parameter gets: that of the group its module declares, "rest", "cross" or "head"."""

from __future__ import annotations

from torch import nn


def declare_group(group: str, *modules: nn.Module) -> None:
    """Puts every parameter of ``modules`` into ``group``, as the class attribute ``learning_rate_group`` would."""
    for module in modules:
        module.learning_rate_group = group


def declared_group(root: nn.Module, name: str) -> str:
    """The group of the parameter ``name`` of ``root``: the innermost module around it that declares one says it.

    Raises:
        ValueError: no module declares it.
    """
    module, group = root, getattr(root, "learning_rate_group", None)
    for part in name.split(".")[:-1]:
        module = module.get_submodule(part)
        group = getattr(module, "learning_rate_group", group)
    if group is None:
        raise ValueError(
            f"no module around the parameter {name} says which learning rate it gets; give its module a "
            'learning_rate_group, like "head" for a new head'
        )
    return group
