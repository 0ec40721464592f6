"""Weights of a language model out of its safetensors, a tensor at a time, so that no second model is held."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from model.torchvision_shim import ensure_torchvision
from model.weights.start import Loaded, named_tensors

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_files(name: str) -> list[Path]:
    """The safetensors of a folder, or of a model of the Hugging Face hub: one, or those that its index names.

    Raises:
        ValueError: there are none, or the index names what can be no file beside it.
    """
    for known in (INDEX, WHOLE):
        file = _file(name, known)
        if file is None:
            continue
        return [file] if known == WHOLE else [_shard(name, file, shard) for shard in _names_in(file)]
    raise ValueError(
        f"has neither {WHOLE} nor {INDEX}; give a folder or hub name with weights in safetensors (of other formats"
        " none is read)"
    )


def copy_weights(llm: nn.Module, files: list[Path], fresh: frozenset[str]) -> Loaded | None:
    """Copies what ``files`` hold into ``llm``, in its dtype; names and shapes are compared before anything is written.

    Args:
        llm: of transformers.
        files: safetensors.
        fresh: names of ``llm`` that no file has.

    Returns:
        what was loaded; None, with nothing written, where names differ from the model's, which transformers may know.

    Raises:
        ValueError: a tensor has another shape, or a file is damaged.
    """
    targets = dict(named_tensors(llm))
    shared = {name for name, _ in llm.named_parameters(remove_duplicate=False)} - set(targets)
    shapes, dropped = {}, []
    for name, shape in _shapes(files):
        own = _own_name(llm, name, targets)
        if own is not None:
            shapes[own] = (name, shape)
        elif name in shared:  # the same tensor by its other name
            dropped.append(name)
        else:
            return None
    if set(shapes) != set(targets) - fresh:
        return None
    for own, (name, shape) in shapes.items():
        if shape != tuple(targets[own].shape):
            raise ValueError(f"{name} has shape {shape}, expected {tuple(targets[own].shape)} as its config.json says")
    with torch.no_grad():
        for name, value in _tensors(files):
            if own := _own_name(llm, name, targets):
                targets[own].copy_(value)
    return Loaded(list(shapes), [], sorted(fresh), dropped)


def _own_name(llm: nn.Module, name: str, targets: dict[str, Tensor]) -> str | None:
    """The model's name of a tensor, which files of a model without its head begin one module lower."""
    return next((one for one in (name, f"{llm.base_model_prefix}.{name}") if one in targets), None)


def _shapes(files: list[Path]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                yield from [(name, tuple(opened.get_slice(name).get_shape())) for name in opened.keys()]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file.name} is not readable ({error}); fetch it again") from error


def _tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """One file is open at a time."""
    for file in files:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():
                yield name, opened.get_tensor(name)


def _names_in(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{index.name} is no index of weights ({type(error).__name__}); fetch it again") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index.name} names {name!r}, expected names of safetensors beside it; fetch it again")
    return names


def _shard(name: str, index: Path, shard: str) -> Path:
    file = _file(name, shard)
    if file is None:
        raise ValueError(f"lacks {shard}, which its {index.name} names; fetch the folder again")
    return file


def _file(name: str, file: str) -> Path | None:
    """A file of a folder, or of a repository of the hub, cached or fetched; None where it has none of that name."""
    if Path(name).is_dir():
        return Path(name, file) if Path(name, file).is_file() else None
    ensure_torchvision()
    from transformers.utils import cached_file

    found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)
