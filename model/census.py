"""How many parameters a model has, part by part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Census:
    """Parameters by part: all of them, and those that are trained."""

    parameters: Mapping[str, int]
    trained: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parameters.values())

    def line(self) -> str:
        """The census as the start of a run prints it: ``12.3 M parameters: vision 8.1 M (frozen), top 1.0 M, ..``."""
        parts = []
        for name, number in self.parameters.items():
            frozen = number - self.trained[name]
            note = " (frozen)" if frozen == number else f" ({in_millions(frozen)} of it frozen)" if frozen else ""
            parts.append(f"{name} {in_millions(number)}{note}")
        return f"{in_millions(self.total)} parameters: {', '.join(parts)}"

    def table(self) -> str:
        """One line per part, the largest numbers to the digit."""
        width = max(len(name) for name in [*self.parameters, "together"])
        rows = [(name, number, self.trained[name]) for name, number in self.parameters.items()]
        rows.append(("together", self.total, sum(self.trained.values())))
        head = f"{'part':<{width}}  {'parameters':>14}  {'trained':>14}"
        return "\n".join([head, *(f"{name:<{width}}  {count:>14,}  {trained:>14,}" for name, count, trained in rows)])


def parameter_census(objective: nn.Module) -> Census:
    """The census of an objective: parts are the children of its network, and its heads; a shared tensor counts once.

    Sizes are those of whole parameters, before ZeRO divides them.
    """
    parameters: dict[str, int] = {}
    trained: dict[str, int] = {}
    for name, parameter in objective.named_parameters():
        part = name.removeprefix("net.").split(".")[0]
        count = getattr(parameter, "ds_numel", parameter.numel())
        parameters[part] = parameters.get(part, 0) + count
        trained[part] = trained.get(part, 0) + (count if parameter.requires_grad else 0)
    return Census(parameters, trained)


def in_millions(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 50_000 else f"{number:,}"
