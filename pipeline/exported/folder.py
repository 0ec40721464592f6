"""The form of an exported folder: the names of its files, and the manifest with their hashes, which is written last.

``config.json`` says what the model is, ``model.safetensors`` (or several, with an index) holds what was trained,
``vision_tower/`` and ``language_model/`` what was not, ``tokenizer.json`` and ``preprocessor_config.json`` what it
reads. ``openflm.json`` lists size and SHA-256 of each of them. README.md may be edited, so that it is not listed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.manifest import file_sha256

FORMAT_VERSION = 1
MANIFEST, CONFIG, CARD = "openflm.json", "config.json", "README.md"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER, PROCESSOR = "tokenizer.json", "preprocessor_config.json"
TOWER, LANGUAGE, ADAPTER = "vision_tower", "language_model", "adapter"  # folders of parts
MAX_JSON_BYTES = 1 << 26
HASHING_THREADS = 4
AGAIN = "export or download the folder again"
_NAME = re.compile(r"[\w][\w.\-]*(/[\w][\w.\-]*)?")


def is_exported(folder: Path) -> bool:
    """Whether it was made by `python -m pipeline.export`, or has at least the config.json of such a folder."""
    return any((folder / name).is_file() for name in (MANIFEST, CONFIG))


def defect(folder: Path) -> str | None:
    """Why an exported folder cannot be used; None if every file has the size and hash in its manifest."""
    try:
        entries = read_manifest(folder)["files"]
    except ValueError as error:
        return str(error)
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        return next(filter(None, pool.map(partial(_wrong, folder), entries, entries.values())), None)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an exported folder; raises ValueError unless every byte of it is as it was written."""
    raw = _read(folder / MANIFEST)
    content = _parsed(raw, MANIFEST)
    content.pop("sha256", None)
    if content.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{MANIFEST} has format version {content.get('format_version')}, expected {FORMAT_VERSION}")
    if with_own_hash(content) != raw:
        raise ValueError(f"{MANIFEST} does not match its own SHA-256")
    files = content.get("files")
    if not isinstance(files, dict) or not all(_is_entry(*pair) for pair in files.items()):
        raise ValueError(f"{MANIFEST} lists no files with bytes and sha256, or a name that is no file of an export")
    lacking = [name for name in (CONFIG, TOKENIZER, PROCESSOR) if name not in files]
    lacking += [] if WEIGHTS in files or INDEX in files else [WEIGHTS]
    if lacking:
        raise ValueError(f"{MANIFEST} does not list {lacking[0]}")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of an exported folder, as the manifest lists it.

    Raises:
        ValueError: one of the two is missing, damaged or edited, or is of another kind.
    """
    wrong = _wrong(folder, CONFIG, read_manifest(folder)["files"][CONFIG])
    if wrong:
        raise ValueError(wrong)
    content = _parsed(_read(folder / CONFIG), CONFIG)
    if not isinstance(content.get("settings"), dict) or not isinstance(content.get("parts"), list):
        raise ValueError(f"{CONFIG} has no settings and parts, expected that of an export")
    return content


def run_state(folder: Path) -> dict[str, Any]:
    """What is known of the training of an exported model, as fields of a checkpoint's run state."""
    state = read_manifest(folder).get("state")
    if not isinstance(state, dict):
        raise ValueError("the manifest holds no state of a run")
    return state


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a small file; raises ValueError for anything else."""
    return _parsed(_read(path), path.name)


def with_own_hash(content: Mapping[str, Any]) -> bytes:
    """The bytes of a manifest."""
    digest = hashlib.sha256(json.dumps(content, indent=1).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=1).encode()


def _wrong(folder: Path, name: str, expected: Mapping[str, Any]) -> str | None:
    """Why a listed file is not what it was; what a name links to counts, as caches of the hub are made of links."""
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{name} has {size} bytes, {MANIFEST} says {expected['bytes']}"
        return None if file_sha256(path) == expected["sha256"] else f"{name} does not match its SHA-256 in {MANIFEST}"
    except OSError as error:
        return f"{name} is not readable ({error.strerror or error})"


def _is_entry(name: Any, entry: Any) -> bool:
    is_named = isinstance(name, str) and _NAME.fullmatch(name) and ".." not in name
    return bool(is_named) and isinstance(entry, dict) and {"bytes", "sha256"} <= set(entry)


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"{path.name} has {path.stat().st_size} bytes, expected at most {MAX_JSON_BYTES}")
        return path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path.name} is missing") from None
    except OSError as error:
        raise ValueError(f"{path.name} is not readable ({error.strerror or error})") from None


def _parsed(raw: bytes, name: str) -> dict[str, Any]:
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{name} holds a {type(content).__name__}, expected an object")
    return content
