"""The format of a checkpoint on disk: its files, written without pickles, and the manifest with their hashes.

``step_00001000/`` holds ``KIND-RANK-NUMBER.safetensors`` (KIND: weight, exp_avg, exp_avg_sq; each rank writes what it
holds: whole tensors, or a range of the flattened tensor where ZeRO divides it), ``state.json``, and ``manifest.json``
with the size and SHA-256 of each of them and of itself. It is written in ``step_00001000.tmp``, synced, listed in the
manifest last and renamed: a checkpoint is complete or absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from data_prep.manifest import file_sha256, sync_directory
from pipeline.checkpoint.folders import FOLDER, published, step_of

FORMAT_VERSION = 2
MAX_FILE_BYTES = 1 << 30
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam, by their names in torch
KINDS = ("weight", *MOMENTS)
MANIFEST, STATE = "manifest.json", "state.json"
DIVIDED = "divided"  # entry of a file's metadata: name -> first element of this part, and the shape of the whole
_FILE = re.compile(rf"state\.json|({'|'.join(KINDS)})-\d{{5}}-\d{{5}}\.safetensors")
_MAX_JSON_BYTES = 1 << 28
HASHING_THREADS = 4
T = TypeVar("T")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, with the reason and what to do."""


def checkpoint_path(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def run_of(checkpoint: Path) -> Path:
    """The run folder of a checkpoint folder RUN/checkpoints/step_N; an exported folder is its own."""
    return checkpoint if step_of(checkpoint) is None else checkpoint.parent.parent


def newest_valid(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run that passes verification, and the newer ones skipped, with the reason."""
    skipped = []
    for path in reversed(published(run)):
        reason = defect(path)
        if reason is None:
            return path, skipped
        skipped.append(f"{path.name}: {reason}")
    return None, skipped


def defect(path: Path, hashes: bool = True) -> str | None:
    """Why a checkpoint is invalid; None if every file has the size (and hash) in its manifest.

    One process alone; ``verify.newest_whole`` is the same for the ranks of a job.
    """
    entries, reason = listed(path)
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        for check in (wrong_size, wrong_hash) if hashes else (wrong_size,):
            if reason is None:
                reason = next(filter(None, pool.map(partial(check, path), entries, entries.values())), None)
    return reason


def listed(path: Path) -> tuple[dict[str, dict[str, Any]], str | None]:
    """Every file of a checkpoint by name, with "bytes" and "sha256", by its manifest; or why there is no such list."""

    def read() -> dict[str, dict[str, Any]]:
        if path.is_symlink():
            raise CheckpointError("is a symbolic link; move the folder itself here")
        files = read_manifest(path)["files"]
        return {name: {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])} for name, entry in files.items()}

    entries, reason = attempt(read)
    return entries or {}, reason


def wrong_size(path: Path, name: str, expected: Mapping[str, Any]) -> str | None:
    """Why a file of a checkpoint is not what the manifest lists, by its kind and size; None if it is."""
    size, reason = attempt(lambda: _regular_size(path / name))
    if reason is None and size != expected["bytes"]:
        reason = f"{name} has {size} bytes, the manifest says {expected['bytes']}"
    return reason


def wrong_hash(
    path: Path, name: str, expected: Mapping[str, Any], sha256: Callable[[Path], str] = file_sha256
) -> str | None:
    """The same by its content, which is read whole by ``sha256``."""
    found, reason = attempt(lambda: sha256(path / name))
    if reason is None and found != expected["sha256"]:
        reason = f"{name} does not match its SHA-256"
    return reason


def attempt(read: Callable[[], T]) -> tuple[T | None, str | None]:
    """What ``read`` returns, or why the files of a checkpoint are not what they should be."""
    try:
        return read(), None
    except CheckpointError as error:
        return None, str(error)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        return None, f"unreadable ({type(error).__name__}: {error})"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder; raises CheckpointError unless every byte of it is as it was written."""
    raw = read_json_bytes(folder / MANIFEST)
    content = json.loads(raw)
    if not isinstance(content, dict):
        raise CheckpointError("manifest.json is not an object")
    if content.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(f"format version {content.get('format_version')}, expected {FORMAT_VERSION}")
    content.pop("sha256", None)
    if _with_own_hash(content) != raw:
        raise CheckpointError("manifest.json does not match its own SHA-256")
    if step_of(folder) not in (None, content["step"]):
        raise CheckpointError(f"the manifest is of step {content['step']}: a renamed folder")
    if STATE not in content["files"]:
        raise CheckpointError("the manifest does not list state.json")
    for name in content["files"]:
        if not _FILE.fullmatch(name):
            raise CheckpointError(f"the manifest lists {name!r}, which is no file of a checkpoint")
    return content


def read_json_bytes(path: Path) -> bytes:
    """The bytes of a small regular file; raises CheckpointError where there is none."""
    size = _regular_size(path)
    if size > _MAX_JSON_BYTES:
        raise CheckpointError(f"{path.name} has {size} bytes, expected at most {_MAX_JSON_BYTES}")
    return path.read_bytes()


def _regular_size(path: Path) -> int:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path.name} is missing") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path.name} is a link or no regular file")
    return status.st_size


class Piece(NamedTuple):
    """One rank's part of one parameter: the same range of elements of each kind's flattened tensor, on the host."""

    name: str
    begin: int  # first element of the range
    shape: tuple[int, ...]  # of the whole tensor
    tensors: dict[str, Tensor]  # by kind

    @property
    def is_whole(self) -> bool:
        return all(tuple(tensor.shape) == self.shape for tensor in self.tensors.values())


class PartWriter:
    """Writes one rank's tensors into files of a folder, each synced and hashed from disk; raises OSError."""

    def __init__(self, folder: Path, rank: int, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        self._folder, self._rank, self._max_file_bytes = folder, rank, max_file_bytes
        self._pending: dict[str, dict[str, Tensor]] = {kind: {} for kind in KINDS}
        self._divided: dict[str, dict[str, Any]] = {}
        self._num_files = dict.fromkeys(KINDS, 0)
        self._files: dict[str, dict[str, Any]] = {}

    def add(self, piece: Piece) -> None:
        """Add this rank's part of one parameter; a file is written when it is full."""
        if not piece.is_whole:
            self._divided[piece.name] = {"begin": piece.begin, "shape": piece.shape}
        for kind, tensor in piece.tensors.items():
            pending = self._pending[kind]
            pending[piece.name] = tensor if piece.is_whole else tensor.flatten()
            if sum(one.nbytes for one in pending.values()) >= self._max_file_bytes:
                self._flush(kind)

    def finish(self) -> dict[str, dict[str, Any]]:
        """Write what is pending; returns the manifest's entry of every file written."""
        for kind in KINDS:
            self._flush(kind)
        sync_directory(self._folder)
        return self._files

    def _flush(self, kind: str) -> None:
        pending, self._pending[kind] = self._pending[kind], {}
        if pending:
            path = self._folder / f"{kind}-{self._rank:05d}-{self._num_files[kind]:05d}.safetensors"
            divided = {name: self._divided[name] for name in pending if name in self._divided}
            try:
                save_file(pending, path, {DIVIDED: json.dumps(divided)} if divided else None)
            except SafetensorError as error:
                raise OSError(f"{path.name}: {error}") from error
            self._num_files[kind] += 1
            self._files[path.name] = seal(path)


def seal(path: Path) -> dict[str, Any]:
    """Flush a file to disk; returns its entry in the manifest, the hash computed by reading it back."""
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def publish(folder: Path, final: Path, state: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    """Add state.json and, last, the manifest to ``folder``, then rename it to ``final``; raises OSError."""
    path = folder / STATE
    path.write_text(json.dumps(state, indent=1), encoding="utf-8")
    content = {"format_version": FORMAT_VERSION, "step": state["step"], "files": {**files, STATE: seal(path)}}
    manifest = folder / MANIFEST
    manifest.write_bytes(_with_own_hash(content))
    seal(manifest)
    sync_directory(folder)
    if final.exists():  # the same step again, after a fallback to an older checkpoint
        remove(final)
    os.rename(folder, final)
    sync_directory(final.parent)


def remove(path: Path) -> None:
    """Rename a checkpoint, so that nobody takes it for one any more, then delete it."""
    aside = path.with_name(path.name + ".removed")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(path, aside)
    if aside.is_symlink():
        aside.unlink()
    shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(run: Path) -> None:
    """Delete half-written and half-deleted folders of killed processes."""
    for path in (run / "checkpoints").glob("step_*.*"):
        if path.suffix in (".tmp", ".removed") and FOLDER.fullmatch(path.stem):
            shutil.rmtree(path, ignore_errors=True)


def _with_own_hash(content: dict[str, Any]) -> bytes:
    digest = hashlib.sha256(json.dumps(content, indent=1).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=1).encode()


def weights_hash(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and bytes of all weights in order of name: equal models have equal hashes."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
