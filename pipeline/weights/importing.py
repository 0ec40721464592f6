"""Folders of imported models: made from checkpoints of the FLM release, and written back to its layout.

Nothing in a checkpoint is executed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from model.config import ModelConfig
from model.weights.released import ImportReport, Layout, from_released, read_layout, to_released
from pipeline.config.options import ConfigError
from pipeline.weights.files import tensors_of, without_prefixes
from pipeline.weights.inert_pickle import read_foreign
from pipeline.weights.sources import IMPORT_RECIPE, IMPORTED

REPORT_NAME = "import.json"
_DAMAGE = (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)  # RecursionError is one


def import_flm(checkpoint: Path, folder: Path, text_heads: int | None = None) -> Layout:
    """Make ``folder`` from a released checkpoint; raises ValueError for one that does not fit, and leaves nothing."""
    if folder.exists():
        raise ConfigError(f"{folder} exists; choose another name or remove it")
    found = read_foreign(checkpoint)
    state = without_prefixes(tensors_of(found, checkpoint), checkpoint)
    layout = read_layout(state, text_heads or _text_heads(found))
    weights, report = from_released(state, layout)
    partial = folder.with_name(folder.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {name: value.clone(memory_format=torch.contiguous_format) for name, value in weights.items()}
    save_file(tensors, partial / IMPORTED)
    recipe = {"model": _differences(dataclasses.asdict(layout.model)), "objective": {"name": layout.objective}}
    recipe["model"]["weights"] = str(folder.resolve())
    recipe |= {"task": {"name": layout.task}} if layout.task else {}
    (partial / IMPORT_RECIPE).write_text(yaml.safe_dump(recipe, sort_keys=False))
    (partial / REPORT_NAME).write_text(json.dumps(_as_json(report, layout), indent=1))
    os.rename(partial, folder)
    print(
        f"{checkpoint}: {layout.objective}{f', {layout.task} head' if layout.task else ''}; {len(weights)} tensors in "
        f"{folder / IMPORTED}, {len(report.aliased)} second names, {len(report.dead)} keys that nothing reads"
    )
    return layout


def export_flm(folder: Path, checkpoint: Path) -> None:
    """Write the released state dict of an imported model to ``checkpoint``."""
    for name in (IMPORTED, REPORT_NAME):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder}: no {name} in it; expected a folder made by `import-flm`")
    if checkpoint.exists():
        raise ConfigError(f"{checkpoint} exists; choose another name or remove it")
    try:
        read = json.loads((folder / REPORT_NAME).read_text(encoding="utf-8"))
        report = ImportReport({name: tuple(keys) for name, keys in read["used"].items()}, read["aliased"], read["dead"])
        state = to_released(load_file(folder / IMPORTED), report)
    except _DAMAGE as error:
        raise ConfigError(
            f"{folder}: {IMPORTED} and {REPORT_NAME} do not belong together ({type(error).__name__}: {error}); import "
            "the checkpoint again"
        ) from error
    torch.save({"state_dict": state}, checkpoint)
    print(f"{checkpoint}: {len(state)} tensors under the released names")


def _text_heads(found: dict[str, Any]) -> int | None:
    """The number of heads, where the checkpoint holds its settings."""
    settings = found.get("hyper_parameters")
    heads = settings.get("num_heads") if isinstance(settings, dict) else None
    return heads if type(heads) is int and heads > 0 else None


def _differences(settings: dict[str, Any], default: Any = None) -> dict[str, Any]:
    """What differs from the defaults, as recipes hold it."""
    default = dataclasses.asdict(ModelConfig()) if default is None else default
    result = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            if inner := _differences(value, default[name]):
                result[name] = inner
        elif value != default[name]:
            result[name] = value
    return result


def _as_json(report: ImportReport, layout: Layout) -> dict[str, Any]:
    return {"objective": layout.objective, "task": layout.task, **dataclasses.asdict(report)}
