"""Reads state dicts from files of others, whatever trainer wrote them, without running anything in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

WRAPPERS = ("state_dict", "model", "model_state_dict", "module")  # of the state dict, beside optimizer and counters
PREFIX, COMPILED = "module.", "_orig_mod."  # of DistributedDataParallel, and of torch.compile wherever it was applied


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The state dict in a safetensors or PyTorch file, without what trainers put around it and before its names.

    Raises:
        ValueError: not such a file, or one that holds no tensors by name.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            return without_prefixes(load_file(path), path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file ({error}); fetch it again") from error
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds here; all mean that the file can't be used
        raise ValueError(
            f"{path} is not a plain weights file ({type(error).__name__}); expected safetensors or a state dict saved"
            " by torch.save"
        ) from error
    return without_prefixes(tensors_of(loaded, path), path)


def tensors_of(content: Any, path: Path) -> dict[str, Tensor]:
    """The tensors by name in what ``path`` holds, or in the first of WRAPPERS in it; what is no tensor is left out.

    Raises:
        ValueError: there are none, or their names are no strings.
    """
    inner = content
    while isinstance(inner, Mapping) and not any(isinstance(value, Tensor) for value in inner.values()):
        wrapper = next((name for name in WRAPPERS if name in inner), None)
        if wrapper is None:
            break
        inner = inner[wrapper]
    if not isinstance(inner, Mapping):
        raise ValueError(f"{path}: holds a {type(inner).__name__}, expected tensors by name as in a state dict")
    found = {name: value for name, value in inner.items() if isinstance(value, Tensor)}
    other = next((name for name in found if not isinstance(name, str)), None)
    if other is not None or not found:
        what = "no tensors" if other is None else f"a tensor named {other!r}"
        raise ValueError(f"{path}: holds {what}, expected tensors by name as in a state dict")
    return found


def without_prefixes(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """``state`` under the names that the model itself has; raises ValueError if two become one."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        plain = name.replace(COMPILED, "")
        while plain.startswith(PREFIX):
            plain = plain.removeprefix(PREFIX)
        if plain in found:
            raise ValueError(f"{path}: holds {plain} twice, with and without a trainer's prefix; remove one of them")
        found[plain] = value
    return found
