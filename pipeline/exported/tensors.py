"""Reads the trained weights of an exported folder by our names; nothing is unpickled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.exported.folder import AGAIN, INDEX, WEIGHTS, read_config, read_json

FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # dtype in config.json -> as safetensors writes it


class ExportedWeights:
    """The tensors of model.safetensors, or of the files that its index names.

    Its members are those of a checkpoint's reader; the only ``kind`` is "weight".
    """

    def __init__(self, folder: Path) -> None:
        """Raises ValueError for a file that is damaged, or holds other tensors than index and config.json say."""
        dtype = FLOATS.get(read_config(folder).get("dtype"))
        if dtype is None:
            raise ValueError(f"{folder}: config.json names no dtype of {', '.join(FLOATS)}; {AGAIN}")
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        listed = None if (folder / WEIGHTS).is_file() else _index(folder)
        for file in [WEIGHTS] if listed is None else sorted(set(listed.values())):
            for name, found, shape in _tensors_in(folder / file):
                if found in FLOATS.values() and found != dtype:
                    raise ValueError(
                        f"{folder}: {name} in {file} is of dtype {found}, config.json says {dtype}; {AGAIN}"
                    )
                if listed is not None and listed.get(name) != file:
                    raise ValueError(f"{folder}: {file} holds {name}, which {INDEX} places elsewhere; {AGAIN}")
                self._files[name], self._shapes[name] = folder / file, shape
        if listed is not None and (missing := sorted(set(listed) - set(self._files))):
            raise ValueError(f"{folder}: {INDEX} names {missing[0]}, which {listed[missing[0]]} does not hold; {AGAIN}")

    def shapes(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Shape by name."""
        return dict(self._shapes)

    def read(self, kind: str, name: str) -> Tensor:
        """One tensor, on the host, in the dtype on file."""
        with safe_open(self._files[name], framework="pt") as opened:
            return opened.get_tensor(name)

    def read_all(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, self.read(kind, name)) for name in self._shapes)


def _tensors_in(file: Path) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of each tensor."""
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():
                part = opened.get_slice(name)
                yield name, part.get_dtype(), tuple(part.get_shape())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is no whole safetensors file ({error}); {AGAIN}") from None


def _index(folder: Path) -> dict[str, str]:
    """File by name of tensor."""
    names = read_json(folder / INDEX).get("weight_map")
    is_map = isinstance(names, dict) and all(
        isinstance(file, str) and Path(file).name == file and file.endswith(".safetensors") for file in names.values()
    )
    if not is_map:
        raise ValueError(f"{folder}: {INDEX} names no safetensors beside it; {AGAIN}")
    return names
