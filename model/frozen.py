"""Parts of a model that are not trained: no gradient, and evaluation mode whatever is called on what holds them."""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType

from torch import Tensor, nn

MARK = "frozen_source"


def freeze(module: nn.Module, source: str) -> None:
    """Takes ``module`` out of training for good; its parameters and persistent buffers stay as they are.

    ``source`` says, for people, where its weights come from: checkpoints hold a hash of them instead of a copy.
    """
    module.requires_grad_(False)
    setattr(module, MARK, source)
    for part in module.modules():  # .train() of a parent, of an engine or of a part reaches these
        part.train = MethodType(_stay_in_evaluation, part)
    module.eval()


def unfreeze(part: nn.Module) -> None:
    """Takes a part of a frozen module back into training: it gets a gradient and follows the mode of what is around."""
    part.requires_grad_(True)
    follow_mode(part)


def follow_mode(part: nn.Module) -> None:
    """Lets a frozen module, whose weights stay as they are, follow the mode of what is around: its dropout comes on."""
    for module in part.modules():
        vars(module).pop("train", None)


def _stay_in_evaluation(module: nn.Module, mode: bool = True) -> nn.Module:
    """``mode`` reaches what is trained inside (``unfreeze``)."""
    module.training = False
    for child in module.children():
        child.train(mode)
    return module


def frozen_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters without gradient and persistent buffers of frozen parts, by name."""
    found = {name: value for name, value in model.named_parameters() if not value.requires_grad}
    frozen = _frozen_prefixes(model)
    return found | {name: value for name, value in persistent_buffers(model) if name.startswith(frozen)}


def trained_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Persistent buffers outside of frozen parts, by name."""
    frozen = _frozen_prefixes(model)
    yield from ((name, value) for name, value in persistent_buffers(model) if not name.startswith(frozen))


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that a state dict holds, by name."""
    for prefix, child in model.named_modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and name not in child._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def frozen_source(model: nn.Module) -> str:
    """Where the weights of the frozen parts come from, in words."""
    found = dict.fromkeys(getattr(module, MARK) for module in model.modules() if hasattr(module, MARK))
    return ", ".join(found) or "an unnamed source"


def _frozen_prefixes(model: nn.Module) -> tuple[str, ...]:
    return tuple(f"{name}." if name else "" for name, module in model.named_modules() if hasattr(module, MARK))
