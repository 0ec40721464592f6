"""The vision tower as a graph of its own: torch.export and ONNX, compared with the tower itself."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config.options import ConfigError
from pipeline.exporting.samples import Sample

EXPORTED, ONNX = "vision_tower.pt2", "vision_tower.onnx"
INPUT, OUTPUT = "images", "tokens"  # uint8 [B, 3, S, S] -> [B, P, W]
OPSET = 18


def write_graphs(tower: nn.Module, folder: Path, samples: Sequence[Sample], exported: bool, onnx: bool) -> list[str]:
    """The graphs asked for, for any number of images; names of the files.

    Raises:
        ConfigError: the tower cannot be traced, or a graph gives other tokens.
    """
    if not exported and not onnx:
        return []
    images = torch.cat([one.pixels for one in samples])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = tower(images)
        program = _traced(tower, images)
        bound = tolerance(tower) * float(expected.abs().max())
        names = [_write_exported(program, folder, images, expected, bound)] if exported else []
        return names + (_write_onnx(program, folder, images, expected, bound) if onnx else [])


def refuse_without_onnx() -> None:
    """Raise ConfigError where --onnx asks for what is not installed."""
    for name in ("onnxruntime", "onnxscript"):  # torch asks for the second
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(f"--onnx needs {name}: pip install '.[onnx]'") from error


def tolerance(tower: nn.Module) -> float:
    """How far tokens of two right computations in fp32 may lie apart, as a share of the largest token.

    Each addition is off by eps / 2 at most, up or down: n of them by sqrt(n) * eps / 2. The sums of a tower are as long
    as the rows of its weights, one layer upon the other; both sides are off, by 5 deviations at most. A factor of 10 is
    for values that cancel, whose size is above that of what is left.
    """
    terms = sum(value[0].numel() for value in tower.parameters() if value.ndim > 1)
    return 10 * 2 * 5 * math.sqrt(terms) * torch.finfo(torch.float32).eps / 2


def _traced(tower: nn.Module, images: Tensor) -> Any:
    try:
        shapes = {"images": {0: torch.export.Dim("B", min=1, max=4096)}}
        return torch.export.export(tower, (), {"images": images}, dynamic_shapes=shapes)
    except Exception as error:  # towers of others make the tracer raise anything
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"the vision tower can't be traced ({reason}); leave --onnx and --torch-export out"
        ) from error


def _write_exported(program: Any, folder: Path, images: Tensor, expected: Tensor, bound: float) -> str:
    torch.export.save(program, folder / EXPORTED)
    _refuse_other(program.module()(images=images), expected, bound, EXPORTED)
    return EXPORTED


def _write_onnx(program: Any, folder: Path, images: Tensor, expected: Tensor, bound: float) -> list[str]:
    import onnxruntime

    written = torch.onnx.export(program, verbose=False, opset_version=OPSET)
    written.model.graph.inputs[0].name, written.model.graph.outputs[0].name = INPUT, OUTPUT
    before = set(folder.iterdir())
    written.save(folder / ONNX)
    session = onnxruntime.InferenceSession(str(folder / ONNX), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {INPUT: images.numpy()})
    _refuse_other(torch.from_numpy(found), expected, bound, ONNX)
    return sorted(path.name for path in set(folder.iterdir()) - before)


def _refuse_other(found: Tensor, expected: Tensor, bound: float, name: str) -> None:
    largest = float((found.float() - expected.float()).abs().max()) if found.shape == expected.shape else math.inf
    if not largest <= bound:
        raise ConfigError(
            f"{name} gives tokens that differ by {largest:.3g}, expected at most {bound:.3g}; leave it out"
        )
