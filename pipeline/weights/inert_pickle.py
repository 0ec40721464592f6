"""Reads the tensors of a foreign PyTorch file without running anything that the file asks for.

Checkpoints of training frameworks hold objects of that framework beside the tensors, so ``weights_only`` refuses them.
Here every class and function that a file names, but for those that rebuild tensors, becomes an inert placeholder.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

_REBUILDS = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch", "Size"),
}


class ForeignObject:
    """Stands for whatever a file named; keeps nothing and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, *_: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        pass

    def extend(self, _: Any) -> None:
        pass


class Unpickler(pickle.Unpickler):
    """The unpickler that torch.load is given (as the attribute of that name of ``pickle_module``)."""

    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(module, name) if (module, name) in _REBUILDS else ForeignObject


class _PickleModule:
    Unpickler = Unpickler
    UnpicklingError = pickle.UnpicklingError

    @staticmethod
    def load(file: Any, **options: Any) -> Any:
        return Unpickler(file, **options).load()


def read_foreign(path: Path) -> dict[str, Any]:
    """The top level of a file saved by torch.save, tensors whole, everything else of foreign types inert.

    Raises:
        ValueError: not such a file, or one in PyTorch's format before version 1.6.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: not a file saved by torch.save of PyTorch 1.6 or later; convert it there first")
    with zipfile.ZipFile(path) as archive:
        if any(name.rpartition("/")[2] == "constants.pkl" for name in archive.namelist()):
            raise ValueError(f"{path}: is a TorchScript program, which reading would run; save its state_dict instead")
    try:
        found = torch.load(path, map_location="cpu", pickle_module=_PickleModule, weights_only=False)
    except Exception as error:  # unpickling foreign bytes fails in many ways; all mean that the file cannot be used
        raise ValueError(f"{path}: cannot be read ({type(error).__name__}: {error}); is it whole?") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds a {type(found).__name__}, expected a dictionary of tensors")
    return found
