"""Writes tensors into safetensors one at a time, in as many files as the size of one allows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from pipeline.exported.folder import INDEX, WEIGHTS

MAX_FILE_BYTES = 5 * 10**9  # as transformers' max_shard_size
NAMES = {
    **{torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.bool: "BOOL"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
}


class Stored(NamedTuple):
    """A tensor to be written: ``read`` gives it in this dtype and shape, when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def stored(name: str, value: Tensor, dtype: torch.dtype) -> Stored:
    """A tensor of a model under ``name``, floats in ``dtype``; it is converted when it is written."""
    kept = dtype if value.is_floating_point() else value.dtype
    return Stored(name, kept, tuple(value.shape), lambda: value.detach().to("cpu", kept).contiguous())


def write_tensors(
    folder: Path, tensors: Sequence[Stored], metadata: Mapping[str, str], max_bytes: int = MAX_FILE_BYTES
) -> list[str]:
    """model.safetensors in ``folder``, or model-00001-of-N.safetensors .. with their index; the names of the files.

    A file exceeds ``max_bytes`` only where one tensor does. Raises OSError.
    """
    groups: list[list[Stored]] = [[]]
    for one in tensors:
        if groups[-1] and sum(other.num_bytes for other in groups[-1]) + one.num_bytes > max_bytes:
            groups.append([])
        groups[-1].append(one)
    if len(groups) == 1:
        _write_file(folder / WEIGHTS, groups[0], metadata)
        return [WEIGHTS]
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    for name, group in zip(names, groups, strict=True):
        _write_file(folder / name, group, metadata)
    index = {
        "metadata": {"total_size": sum(one.num_bytes for one in tensors)},
        "weight_map": {one.name: name for name, group in zip(names, groups, strict=True) for one in group},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return [*names, INDEX]


def _write_file(path: Path, tensors: Sequence[Stored], metadata: Mapping[str, str]) -> None:
    """A safetensors file: length of the header (8 bytes), header (JSON, padded to 8 bytes), then all bytes in turn."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for one in tensors:
        header[one.name] = {
            "dtype": NAMES[one.dtype],
            "shape": list(one.shape),
            "data_offsets": [end, end + one.num_bytes],
        }
        end += one.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for one in tensors:
            _write_one(stream, one)


def _write_one(stream: BinaryIO, one: Stored) -> None:
    value = one.read()
    assert value.dtype == one.dtype and tuple(value.shape) == one.shape
    stream.write(memoryview(value.reshape(-1).view(torch.uint8).numpy()))
