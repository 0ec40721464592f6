"""Reads state dicts from files of others, whatever trainer wrote them, without running anything in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from pipeline.weights.inert_pickle import check_archive, is_archive

WRAPPERS = ("state_dict", "model", "model_state_dict", "module")  # of the state dict, beside optimizer and counters
MAX_NAMES_FOR_BYTES = 16  # released models give shared layers up to four names
COMPILED = "_orig_mod."  # of torch.compile, wherever it was applied
_PREFIXES = re.compile(r"^(module\.)+")  # of DistributedDataParallel


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The state dict in a safetensors or PyTorch file, without what trainers put around it and before its names.

    Raises:
        ValueError: not such a file, or one that holds no tensors by name.
    """
    archive = is_archive(path)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            return without_prefixes(load_file(path), path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file ({error}); fetch it again") from error
    if archive:
        check_archive(path)
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
    for _ in WRAPPERS:  # a wrapper could hold itself
        if not isinstance(inner, Mapping) or any(isinstance(value, Tensor) for value in inner.values()):
            break
        inner = next((inner[name] for name in WRAPPERS if name in inner), inner)
    if not isinstance(inner, Mapping):
        raise ValueError(f"{path}: holds a {type(inner).__name__}, expected tensors by name as in a state dict")
    found = {name: value for name, value in inner.items() if isinstance(value, Tensor)}
    _bound_sizes(found, path)
    other = next((name for name in found if not isinstance(name, str)), None)
    if other is not None or not found:
        what = "no tensors" if other is None else f"a tensor named {other!r}"
        raise ValueError(f"{path}: holds {what}, expected tensors by name as in a state dict")
    return found


def _bound_sizes(tensors: Mapping[Any, Tensor], path: Path) -> None:
    """Raise ValueError for tensors that claim more elements than the file has bytes for, before work is done on them.

    A tensor of stride 0 repeats one element as often as its shape says; the same bytes may have several names, as
    shared layers do.
    """
    size, total = path.stat().st_size, 0
    for name, value in tensors.items():
        if value.layout != torch.strided or value.device.type == "meta":
            raise ValueError(f"{path}: {name} is a {value.layout} tensor on {value.device}, expected plain ones")
        claimed = value.nelement() * value.element_size()
        total += claimed
        if claimed > size or total > MAX_NAMES_FOR_BYTES * size:
            raise ValueError(
                f"{path}: {name} claims {claimed} bytes (with those before it {total}) in a file of {size}; save its "
                "tensors with .clone()"
            )


def without_prefixes(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """``state`` under the names that the model itself has; raises ValueError if two become one."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        plain = _PREFIXES.sub("", name.replace(COMPILED, ""))
        if plain in found:
            raise ValueError(f"{path}: holds {plain} twice, with and without a trainer's prefix; remove one of them")
        found[plain] = value
    return found
