"""Writes and reads incidents: RUN/incidents/step_N/incident.json, one per bad step, complete or absent."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.manifest import sync_directory, write_atomically

FOLDER, FILE_NAME = "incidents", "incident.json"
FORMAT_VERSION = 1
REQUIRED = ("step", "reason", "micro_batches", "counts", "terms", "topology", "config", "checkpoint")
_WORDS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class IncidentError(ValueError):
    """An incident that cannot be read, with the reason and what to do."""


def incident_folder(run: Path, step: int) -> Path:
    return run / FOLDER / f"step_{step:08d}"


def write_incident(run: Path, step: int, content: Mapping[str, Any]) -> Path:
    """Write the incident of step ``step`` (0-based) in one move, replacing an older one; returns its folder."""
    folder = incident_folder(run, step)
    beside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    text = json.dumps({"format_version": FORMAT_VERSION, **to_json(content)}, indent=1)
    write_atomically(beside / FILE_NAME, text)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(beside, folder)
    sync_directory(folder.parent)
    return folder


def read_incident(path: Path) -> dict[str, Any]:
    """The content of an incident given by its folder or its incident.json, numbers that are not finite restored.

    Raises:
        IncidentError: it is missing, damaged or incomplete.
    """
    file = path / FILE_NAME if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise IncidentError(f"{file}: no such file; expected a folder RUN/{FOLDER}/step_N of a training run") from None
    except (OSError, ValueError) as error:
        raise IncidentError(f"{file}: cannot be read ({error}); the incident is damaged, use another") from None
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        raise IncidentError(f"{file}: found another format, expected format_version {FORMAT_VERSION}")
    if missing := [key for key in REQUIRED if key not in content]:
        raise IncidentError(f"{file}: has no entry {missing[0]!r}; the incident is damaged, use another")
    return from_json(content)


def list_incidents(run: Path) -> list[Path]:
    """Incident folders of a run in order of step."""
    return sorted(path.parent for path in (run / FOLDER).glob(f"step_*/{FILE_NAME}") if path.parent.suffix != ".tmp")


def name_checkpoint(run: Path, old: str, new: str | None) -> None:
    """Make every incident that names checkpoint ``old`` name ``new``; raises OSError."""
    for folder in list_incidents(run):
        try:
            content = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # a damaged incident stays as it is; replay refuses it
        if content.get("checkpoint") == old:
            write_atomically(folder / FILE_NAME, json.dumps(content | {"checkpoint": new}, indent=1))


def to_json(value: Any) -> Any:
    """Plain JSON values; NaN and infinities become the strings "nan", "inf" and "-inf"."""
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def from_json(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: from_json(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return value if key == "keys" else [from_json(item) for item in value]
    return _WORDS.get(value, value) if isinstance(value, str) else value
