"""Reads the tensors of a foreign PyTorch file without running anything that the file asks for.

``torch.load(weights_only=True)`` runs nothing but PyTorch's own functions that rebuild tensors. It refuses the files
of training frameworks, which hold objects of their own beside the tensors. Here every class or function that PyTorch
does not know becomes an inert placeholder, named to it as safe for the time of the call.
"""

from __future__ import annotations

import io
import pickletools
import stat
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch._utils import IMPORT_MAPPING, NAME_MAPPING
from torch.serialization import StorageType, get_unsafe_globals_in_checkpoint, safe_globals

MAX_PICKLE_BYTES = 1 << 25  # of the part that names tensors, about 300 bytes each; the tensors are stored beside it
MAX_TUPLE = 10_000  # elements of a tuple, those of the tuples in it included, once for each time that they occur
# What of PyTorch a file may name, besides types of storages and numbers. The rest of what weights_only allows makes
# tensors whose size no byte of the file bounds (meta, sparse, nested, wrappers), or blank memory of any size.
_PLAIN = {
    "collections.OrderedDict",
    "collections.Counter",
    "torch.Size",
    "torch.device",
    "torch.storage.UntypedStorage",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch.nn.parameter.Parameter",
    "_codecs.encode",
    "builtins.set",
    "builtins.complex",
}
_NEVER = {"os", "posix", "nt", "sys"}  # modules that weights_only refuses even as placeholders
_PUSHED = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_POPPED = {"REDUCE": 1, "NEWOBJ": 1, "BUILD": 1, "APPEND": 1, "SETITEM": 2}  # and the object below stays


class ForeignObject:
    """Stands for whatever a file named; keeps nothing and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> ForeignObject:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class ForeignDictionary:
    """What stands for a class that the file fills by key: a plain dictionary, whatever it is called with."""

    def __new__(cls, *_: Any, **__: Any) -> OrderedDict:  # type: ignore[misc]
        return OrderedDict()


class ForeignList:
    """What stands for a class that the file appends to: a plain list."""

    def __new__(cls, *_: Any, **__: Any) -> list:  # type: ignore[misc]
        return []


def read_foreign(path: Path) -> dict[str, Any]:
    """The top level of a file saved by torch.save, tensors whole, everything else of foreign types inert.

    Tensors are mapped from the file, not read. Foreign dictionaries and lists become plain ones.

    Raises:
        ValueError: not such a file, one in PyTorch's format before version 1.6, a TorchScript program, or one that asks
            for what no file of weights needs.
    """
    if not is_archive(path):
        raise ValueError(f"{path}: not a file saved by torch.save of PyTorch 1.6 or later; convert it there first")
    kinds = check_archive(path)
    try:
        foreign = get_unsafe_globals_in_checkpoint(path)
        if system := sorted(name for name in foreign if name.partition(".")[0] in _NEVER):
            raise ValueError(f"asks for {system[0]}: no file of weights does, it was made to run something")
        with safe_globals([(kinds.get(name, ForeignObject), name) for name in foreign]):
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # unpickling foreign bytes fails in many ways; all mean that the file cannot be used
        raise ValueError(f"{path}: cannot be read ({_first_line(error)}); is it whole?") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds a {type(found).__name__}, expected a dictionary of tensors")
    return found


def is_archive(path: Path) -> bool:
    """Whether a file is in PyTorch's format since 1.6, a zip; raises ValueError for what is no regular file."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ValueError(f"{path}: no such file ({_first_line(error)})") from error
    if not stat.S_ISREG(mode):  # a pipe or a device could be read for ever
        raise ValueError(f"{path}: not a regular file; expected one saved by torch.save, or safetensors")
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: cannot be read ({_first_line(error)}); is it whole?") from error


def check_archive(path: Path) -> dict[str, type]:
    """Check a zip of torch.save by what it lists and its pickle names, before PyTorch sees it.

    Members must be stored as they are (nothing grows when read), below one folder, once each, and within the file.

    Returns:
        For each foreign name that the pickle fills like a dictionary or a list, what stands for it.

    Raises:
        ValueError: it is not as torch.save writes it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            name = _pickle_of(archive.infolist(), path.stat().st_size)
            return _uses(archive.read(name))
    except _Refused as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # zipfile and pickletools fail in many ways; all mean that the file cannot be used
        raise ValueError(f"{path}: cannot be read ({_first_line(error)}); is it whole?") from error


class _Refused(Exception):
    """Why a file is not read, in words that follow its name."""


def _pickle_of(members: list[zipfile.ZipInfo], file_size: int) -> str:
    """The name of the pickle among the members of an archive, if they are as torch.save writes them."""
    names = [member.filename for member in members]
    if any(name.lower().endswith("/constants.pkl") for name in names):
        raise _Refused("is a TorchScript program, which reading would run; save its state_dict instead")
    counts = Counter(name.lower() for name in names)  # PyTorch looks members up without regard to case
    twice = next((name for name, count in counts.items() if count > 1), None)
    folder = names[0].partition("/")[0] if names else ""
    outside = next((name for name in names if not _is_below(name, folder)), None)
    if twice is not None or outside is not None:
        what = f"member {twice!r} twice" if twice is not None else f"a member {outside!r} outside its folder {folder!r}"
        raise _Refused(f"has {what}; torch.save writes no such file")
    packed = next((member for member in members if member.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None or sum(member.file_size for member in members) > file_size:
        what = "members larger than the file" if packed is None else f"a compressed member {packed.filename!r}"
        raise _Refused(f"has {what}; torch.save compresses nothing, save it again from PyTorch")
    sizes = [member.file_size for member in members if member.filename == f"{folder}/data.pkl"]
    if len(sizes) != 1 or sizes[0] > MAX_PICKLE_BYTES:
        raise _Refused(f"has data.pkl of {sizes} bytes, expected one of at most {MAX_PICKLE_BYTES}")
    return f"{folder}/data.pkl"


def _is_below(name: str, folder: str) -> bool:
    parts = name.split("/")
    return len(parts) > 1 and parts[0] == folder and not {"", ".", ".."} & set(parts) and "\\" not in name


def _uses(pickled: bytes) -> dict[str, type]:
    """What foreign names of a pickle are filled like, found by following its stack without making anything.

    Known of each object on the stack: its name, or that of its class, and how many elements it has as a tuple. Python
    hashes tuples through all their parts, and a hundred bytes can name one with 2^50 of them.
    """
    known = torch._weights_only_unpickler._get_allowed_globals()  # what get_unsafe_globals_in_checkpoint leaves out
    kinds: dict[str, type] = {}
    stack: list[tuple[str, int]] = []
    marks: list[int] = []
    memo: dict[int, tuple[str, int]] = {}
    for opcode, argument, _ in pickletools.genops(io.BytesIO(pickled)):
        operation = opcode.name
        if operation == "GLOBAL":
            module, _, name = argument.partition(" ")
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))  # of Python 2
            name = f"{module}.{name}"
            if name in known and name not in _PLAIN and not isinstance(known[name], torch.dtype | StorageType):
                raise _Refused(f"makes objects by {name}; save plain tensors, as state_dict() gives them")
            stack.append((name, 1))
        elif operation == "MARK":
            marks.append(len(stack))
        elif operation in ("APPENDS", "SETITEMS", "TUPLE"):
            filled = stack[(begin := marks.pop()) :]
            del stack[begin:]
            if operation == "TUPLE":
                stack.append(_tuple_of(filled))
            else:
                kinds[stack[-1][0]] = ForeignList if operation == "APPENDS" else ForeignDictionary
        elif operation in _PUSHED:
            filled = stack[-_PUSHED[operation] :]
            del stack[-_PUSHED[operation] :]
            stack.append(_tuple_of(filled))
        elif operation in _POPPED:
            del stack[-_POPPED[operation] :]
            stack[-1] = (stack[-1][0], 1)
            if operation in ("APPEND", "SETITEM"):
                kinds[stack[-1][0]] = ForeignList if operation == "APPEND" else ForeignDictionary
        elif operation in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif operation in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif operation == "BINPERSID":
            stack[-1] = ("", 1)
        elif operation not in ("PROTO", "STOP"):
            stack.append(("", 1))  # a constant, an empty container; torch.load refuses all other operations
    return kinds


def _tuple_of(parts: list[tuple[str, int]]) -> tuple[str, int]:
    size = 1 + sum(size for _, size in parts)
    if size > MAX_TUPLE:
        raise _Refused(f"holds a tuple of over {MAX_TUPLE} elements; torch.save writes none for weights")
    return "", size


def _first_line(error: BaseException) -> str:
    text = str(error).rpartition("WeightsUnpickler error: ")[2]  # without the advice to read it unsafely
    lines = text.strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
