"""Norms and non-finite counts of gradients and weights per module: where in the network a bad step went wrong."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

LEVELS = 2  # of a parameter's name: net.text, lm_head.transform


def module_statistics(parameters: Iterable[tuple[str, Tensor | None, Tensor]]) -> dict[str, dict[str, float]]:
    """Statistics per module from (parameter name, gradient or None, weight) of every parameter.

    Norms are L2 over the finite elements, so that they stay readable beside the number of those that are not.
    """
    found: dict[str, dict[str, float]] = {}
    for name, gradient, weight in parameters:
        module = ".".join(name.split(".")[:-1][:LEVELS]) or name
        empty = {"parameters": 0, "grad_norm": 0.0, "bad_gradients": 0, "weight_norm": 0.0, "bad_weights": 0}
        row = found.setdefault(module, empty)
        row["parameters"] += weight.numel()
        for tensor, norm, bad in ((gradient, "grad_norm", "bad_gradients"), (weight, "weight_norm", "bad_weights")):
            if tensor is None:
                continue
            squares, number = _measure(tensor.detach())
            row[norm] += squares
            row[bad] += number
    for row in found.values():
        row["grad_norm"] **= 0.5
        row["weight_norm"] **= 0.5
    return found


def _measure(tensor: Tensor) -> tuple[float, int]:
    """Sum of squares of the finite elements, and how many are not finite."""
    finite = torch.isfinite(tensor)
    squares = torch.where(finite, tensor, 0).double().square().sum()
    return float(squares), int(tensor.numel() - finite.sum())
