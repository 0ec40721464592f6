"""Folders of imported models: made from checkpoints of the releases of FLM and EVLGen; FLM's are written back.

Nothing in a checkpoint is executed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.build import build_evlgen
from model.config import ModelConfig
from model.weights.released import ImportReport, Layout, from_released, read_layout, to_released
from model.weights.released_evlgen import DEAD, FROZEN, RELEASED_MERGES, by_one_name, is_video, read_connector
from model.weights.released_evlgen import RULES as OF_RELEASE
from model.weights.start import foreign_names, joined, start_from
from pipeline.config.options import Config, ConfigError
from pipeline.data.tokenizer import tokenizer_of
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
    recipe = {"model": _differences(dataclasses.asdict(layout.model)), "objective": {"name": layout.objective}}
    recipe |= {"task": {"name": layout.task}} if layout.task else {}
    _write(folder, weights, recipe, _as_json(report, layout))
    print(
        f"{checkpoint}: {layout.objective}{f', {layout.task} head' if layout.task else ''}; {len(weights)} tensors in "
        f"{folder / IMPORTED}, {len(report.aliased)} second names, {len(report.dead)} keys that nothing reads"
    )
    return layout


def import_evlgen(checkpoint: Path, folder: Path, config: Config, merges: int = RELEASED_MERGES) -> None:
    """Make ``folder`` from a checkpoint of EVLGen's release, which holds what is trained only.

    The vision tower and the language model are those of ``config``; ``merges``: of each layer, which no shape tells.

    Raises:
        ValueError: a key is missing, unknown or of another shape, or the towers have other widths; nothing is left.
    """
    if folder.exists():
        raise ConfigError(f"{folder} exists; choose another name or remove it")
    found = read_foreign(checkpoint)
    state = by_one_name(without_prefixes(tensors_of(found, checkpoint), checkpoint))
    own = config.model.connector
    connector, tower_width, language_width = read_connector(state, merges)
    if own.width == connector.width:
        connector.heads = own.heads
    model = dataclasses.replace(config.model, behaviour="released", connector=connector, weights=None)
    if is_video(state):
        model.vision = dataclasses.replace(model.vision, temporal="released")
    with torch.device("meta"):
        objective = build_evlgen(model, tokenizer_of(config).vocabulary, config.data.max_text_length)
    widths = (objective.net.vision.width, objective.net.language.width)
    if widths != (tower_width, language_width):
        raise ConfigError(
            f"{checkpoint} is for a tower of width {tower_width} and a language model of {language_width}, the recipe"
            f" names ones of {widths[0]} and {widths[1]}; name those that it was trained with"
        )
    loaded = start_from(objective, state, OF_RELEASE, str(checkpoint), FROZEN, DEAD)
    weights = {name: joined(name, foreign_names(name, OF_RELEASE), state) for name in loaded.loaded}
    settings = {"model": _differences(dataclasses.asdict(model)), "objective": {"name": "evlgen"}}
    _write(folder, weights, settings, {"objective": "evlgen", "dropped": loaded.dropped})
    print(f"{checkpoint}: evlgen; {len(weights)} tensors in {folder / IMPORTED}, {len(loaded.dropped)} keys unread")


def _write(folder: Path, weights: Mapping[str, Tensor], recipe: dict[str, Any], report: dict[str, Any]) -> None:
    """The folder of an imported model, whole or not there."""
    partial = folder.with_name(folder.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {name: value.clone(memory_format=torch.contiguous_format) for name, value in weights.items()}
    save_file(tensors, partial / IMPORTED)
    recipe["model"]["weights"] = str(folder.resolve())
    (partial / IMPORT_RECIPE).write_text(yaml.safe_dump(recipe, sort_keys=False))
    (partial / REPORT_NAME).write_text(json.dumps(report, indent=1))
    os.rename(partial, folder)


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
