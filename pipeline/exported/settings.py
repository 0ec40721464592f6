"""The settings that an exported model is used with: those of its run, with the files of its folder in their places."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from pipeline.exported.folder import CONFIG, LANGUAGE, TOWER, WEIGHTS, read_config


def exported_settings(folder: Path) -> dict[str, Any]:
    """Nested settings as in a run's config.yaml.

    ``model.weights`` is the folder itself where it holds a frozen vision tower: from there that part is loaded.

    Raises:
        ValueError: config.json is missing, damaged or edited.
    """
    content = read_config(folder)
    settings, parts = copy.deepcopy(content["settings"]), content["parts"]
    try:
        settings["data"]["tokenizer"] = str(folder)
        if TOWER in parts:
            settings["model"]["weights"] = str(folder)
        if LANGUAGE in parts:
            settings["model"]["language"]["name"] = str(folder / LANGUAGE)
        vision = settings["model"]["vision"]
        if str(vision.get("name")).startswith("hf/") and (folder / TOWER / CONFIG).is_file():
            vision["name"] = f"hf/{folder / TOWER}"
        for option, name in content.get("files", {}).items():
            section, _, field = option.partition(".")
            settings[section][field] = str(folder / name)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{CONFIG} has other settings than an export writes ({error})") from None
    return settings


def tower_file(folder: Path) -> Path | None:
    """The weights of the frozen vision tower that an exported folder holds, by its library's names; else None."""
    return folder / TOWER / WEIGHTS if TOWER in read_config(folder)["parts"] else None
