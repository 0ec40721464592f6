"""Tensors are written one at a time, as safetensors itself writes them."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.exporting.streaming import Stored, stored, write_tensors


def test_files_are_those_of_safetensors(tmp_path: Path) -> None:
    """Read by its own reader, of every dtype and shape, and as long as its own writer's."""
    values = {
        "b": torch.arange(6.0).view(2, 3),
        "a": torch.tensor(3),
        "c": torch.zeros(0, 4),
        "d": torch.ones(2, dtype=torch.bool),
    }
    values |= {"e": torch.randn(3, 4).T, "f": torch.randn(5).bfloat16()}
    tensors = [stored(name, value, value.dtype) for name, value in values.items()]
    assert write_tensors(tmp_path, tensors, {"format": "pt"}) == ["model.safetensors"]
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in values.items())
    save_file({name: value.contiguous() for name, value in values.items()}, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "theirs").stat().st_size == (tmp_path / "model.safetensors").stat().st_size


@pytest.mark.parametrize(("max_bytes", "num_files"), [(1 << 30, 1), (800, 5), (1, 10)])
def test_one_tensor_is_held_at_a_time(tmp_path: Path, max_bytes: int, num_files: int) -> None:
    alive: list[weakref.ref] = []

    def read(number: int) -> Callable[[], torch.Tensor]:
        def made() -> torch.Tensor:
            assert all(one() is None for one in alive)
            value = torch.full((100,), float(number))
            alive.append(weakref.ref(value))
            return value

        return made

    tensors = [Stored(f"w{number}", torch.float32, (100,), read(number)) for number in range(10)]
    files = write_tensors(tmp_path, tensors, {}, max_bytes)
    assert len([name for name in files if name.endswith(".safetensors")]) == num_files and len(alive) == 10
    if num_files > 1:
        index = json.loads((tmp_path / files[-1]).read_text())
        assert index["metadata"]["total_size"] == 4000 and list(index["weight_map"]) == [f"w{n}" for n in range(10)]
        for name, file in index["weight_map"].items():
            assert load_file(tmp_path / file)[name][0] == float(name[1:])
