"""What config.json of an exported folder says, without the paths of the machine that trained the model."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn

from pipeline.config.options import Config, to_plain, weighted_paths
from pipeline.exported.folder import LANGUAGE, TOWER

SECTIONS = ("model", "objective", "task", "data", "optim", "train")  # others say how a run is watched, not what it is
NOT_PUBLISHED = ("tokenizer", "stage_dir")  # of data: where something is on the machine that trained
OF_TOWER, OF_LANGUAGE = ("model.vision.name", "model.vision.pretrained", "model.weights"), ("model.language.name",)


def model_config(
    config: Config, objective: nn.Module, dtype: str, parts: list[str], files: dict[str, str], frozen: list[str]
) -> dict[str, Any]:
    """The content of config.json.

    ``parts`` are the folders of frozen weights that are there, of those in ``frozen``; what is not there keeps the name
    that it is loaded by. ``files`` are options and the files of the folder that they name.
    """
    kept = [option for part, names in ((TOWER, OF_TOWER), (LANGUAGE, OF_LANGUAGE)) for option in names]
    kept = [option for option in kept if _is_needed(option, parts, frozen)]
    return {
        "architectures": [type(objective).__name__],
        "library_name": "openflm",
        "openflm_version": version(),
        "task": config.task.name,
        "objective": config.objective.name,
        "image_size": config.model.vision.image_size,
        "dtype": dtype,
        "parts": parts,
        "files": files,
        "settings": published_settings(config, kept),
    }


def published_settings(config: Config, kept: list[str]) -> dict[str, Any]:
    """Nested settings; a path is its last name, but for options in ``kept``."""
    settings = {name: value for name, value in to_plain(config).items() if name in SECTIONS}
    settings["data"] |= dict.fromkeys(NOT_PUBLISHED)
    settings["data"]["paths"] = [Path(str(path)).name for path, _ in weighted_paths(config.data)]
    if "model.weights" not in kept:
        settings["model"]["weights"] = None
    return _without_places(settings, kept)


def version() -> str:
    """Of this package, as it is installed; "unknown" in a checkout that is not."""
    try:
        return metadata.version("openflm")
    except metadata.PackageNotFoundError:
        return "unknown"


def without_place(value: str) -> str:
    """The last name of a path of this machine, also behind hf/; any other word as it is."""
    library, slash, name = value.partition("/")
    if slash and library == "hf" and _is_place(name):
        return f"hf/{Path(name).name}"
    return Path(value).name if _is_place(value) else value


def _is_needed(option: str, parts: list[str], frozen: list[str]) -> bool:
    part = TOWER if option in OF_TOWER else LANGUAGE
    return part in frozen and part not in parts


def _is_place(value: str) -> bool:
    return value.startswith(("/", "~", "./", "../")) or ("/" in value and Path(value).exists())


def _without_places(tree: dict[str, Any], kept: list[str], prefix: str = "") -> dict[str, Any]:
    found = {}
    for name, value in tree.items():
        option = f"{prefix}{name}"
        if isinstance(value, dict):
            value = _without_places(value, kept, f"{option}.")
        elif isinstance(value, str) and option not in kept:
            value = without_place(value)
        found[name] = value
    return found
