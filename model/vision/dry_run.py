"""What a network computes, found by a run on PyTorch's meta device, which knows shapes and products but no values."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode


class Cost(NamedTuple):
    """Shape of the output, and multiply-accumulates of the forward pass."""

    shape: tuple[int, ...]
    macs: int


class _Applied(nn.Module):
    """``function(network, input)`` as a module, which ``functional_call`` needs."""

    def __init__(self, network: nn.Module, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self._function = network, function

    def forward(self, value: Tensor) -> Tensor:
        return self._function(self.network, value)


def cost(network: nn.Module, function: Callable[[nn.Module, Tensor], Tensor], shape: tuple[int, ...]) -> Cost:
    """Of ``function(network, float32 [shape])`` in evaluation mode; matrix products and convolutions are counted."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output, _ = _run(network, function, shape, training=False)
    return Cost(tuple(output.shape), counter.get_total_flops() // 2)


def cut_unused(
    network: nn.Module, function: Callable[[nn.Module, Tensor], Tensor], shape: tuple[int, ...]
) -> list[str]:
    """Removes what ``function(network, float32 [shape])`` does not depend on: a pooler, a head, a mask token.

    No optimizer then holds parameters that never get a gradient. A module gives way to the identity, a parameter of
    its own to None.

    Returns:
        Names of the modules and parameters that were removed.
    """
    with torch.enable_grad():
        output, parameters = _run(network, function, shape, training=True)
        gradients = torch.autograd.grad(output.sum(), list(parameters.values()), allow_unused=True)
    unused = {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None}
    cut: list[str] = []
    for prefix, module in list(network.named_modules()):
        own = {f"{prefix}.{name}" for name, _ in module.named_parameters()}
        if prefix and own and own <= unused and not any(prefix.startswith(f"{one}.") for one in cut):
            network.set_submodule(prefix, nn.Identity())
            cut.append(prefix)
    for name in sorted(unused):
        if not any(name.startswith(f"{one}.") for one in cut):
            parent, _, own_name = name.rpartition(".")
            setattr(network.get_submodule(parent), own_name, None)
            cut.append(name)
    return cut


def _run(
    network: nn.Module, function: Callable[[nn.Module, Tensor], Tensor], shape: tuple[int, ...], training: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and the parameters it was made from, all without values; ``network`` itself stays as it is."""
    meta = lambda tensor: torch.empty_like(tensor, device="meta")  # noqa: E731
    parameters = {name: meta(value).requires_grad_() for name, value in network.named_parameters()}
    buffers = {name: meta(value) for name, value in network.named_buffers()}
    state = {f"network.{name}": value for name, value in (parameters | buffers).items()}
    before = network.training
    network.train(training)
    try:
        output = functional_call(_Applied(network, function), state, (torch.empty(shape, device="meta"),))
    finally:
        network.train(before)
    return output, parameters
