"""Checkpoints that know no topology: fp32 weights and moments by parameter name, complete and verified or not there.

``RUN/checkpoints/step_00001000/`` holds ``weight-*.safetensors``, ``exp_avg-*.safetensors``,
``exp_avg_sq-*.safetensors`` (about 1 GiB each), ``state.json``, and ``manifest.json`` with the size and SHA-256 of each
file. It is written beside, synced, listed in the manifest last and renamed; nothing in it is pickled. Any number of
ranks at any ZeRO stage can read what any other wrote.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.optim import MOMENTS
from pipeline.ranks import Agreement

if TYPE_CHECKING:  # weights are read without DeepSpeed
    from pipeline.engine import TrainEngine

FORMAT_VERSION = 1
MAX_FILE_BYTES = 1 << 30
KINDS = ("weight", *MOMENTS)
_NAME = re.compile(r"step_(\d{8,})")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, with the reason and what to do."""


@dataclass
class RunState:
    """Everything besides tensors that a run needs to go on; random streams are functions of seed and position."""

    step: int = 0  # optimizer steps done
    samples_seen: int = 0  # position in the global sample order
    optimizer_steps: int = 0  # steps Adam has taken
    skipped_steps: int = 0
    loss_scale: dict[str, float] | None = None
    unusable: dict[str, int] = field(default_factory=dict)  # samples by reason
    unusable_shards: dict[str, dict[str, Any]] = field(default_factory=dict)  # name: reason, samples, since_step
    topology: dict[str, Any] = field(default_factory=dict)  # ranks, ZeRO stage and precision that wrote it, for people
    settings: dict[str, Any] = field(default_factory=dict)  # what may change between two parts of a run, by option
    fingerprint: dict[str, Any] = field(default_factory=dict)  # what must not change between two parts of a run
    data_changes: list[dict[str, Any]] = field(default_factory=list)  # what of it was allowed to, after which step


def save(
    run: Path, engine: TrainEngine, state: RunState, keep_last: int, agreement: Agreement, is_main: bool
) -> Path | None:
    """Write ``RUN/checkpoints/step_N`` and remove all but the newest ``keep_last``; every rank must call it.

    Returns None, with an alarm on stderr, when the disk refused; older checkpoints are then left alone.
    """
    final = run / "checkpoints" / f"step_{state.step:08d}"
    writer = _Writer(final) if is_main else None
    state.optimizer_steps, state.loss_scale = engine.optimizer_steps, engine.loss_scale
    for name, tensors in engine.named_state(keep=is_main):
        if writer is not None:
            writer.add(name, tensors)
    if writer is not None:
        writer.finish(state)
        if writer.error is None:
            _retain(final.parent, keep_last)
        else:
            print(f"ALARM: checkpoint {final.name} was not written: {writer.error}", file=sys.stderr, flush=True)
    failed = agreement.total([1 if writer is not None and writer.error is not None else 0])[0]
    return None if failed else final


def newest_valid(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run that proves complete, and what was skipped, with the reason."""
    skipped = []
    for path in reversed(_published(run / "checkpoints")):
        reason = defect(path)
        if reason is None:
            return path, skipped
        skipped.append(f"{path.name}: {reason}")
    return None, skipped


def defect(path: Path) -> str | None:
    """Why a checkpoint cannot be trusted, None if every file has the size and hash of the manifest."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        files = manifest["files"]
        if manifest["format_version"] != FORMAT_VERSION:
            return f"format version {manifest['format_version']}, expected {FORMAT_VERSION}"
        if "state.json" not in files:
            return "the manifest does not list state.json"
        for name, expected in files.items():
            file = path / name
            if file.parent != path or file.is_symlink():
                return f"{name} leaves the folder"
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, the manifest says {expected['bytes']}"
            if _sha256(file) != expected["sha256"]:
                return f"{name} does not match its SHA-256"
    except FileNotFoundError:
        return "manifest.json is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"unreadable ({type(error).__name__}: {error})"
    return None


def resume(
    run: Path,
    engine: TrainEngine,
    agreement: Agreement,
    is_main: bool,
    accept: Callable[[RunState], None] | None = None,
) -> RunState | None:
    """Continue from the newest valid checkpoint; None when the run has none yet. Every rank must call it.

    ``accept`` sees the saved state before anything is loaded, and raises where it belongs to another run.

    Raises:
        CheckpointError: there are checkpoints but none is valid.
    """
    path, skipped = agreement.gather(newest_valid(run) if is_main else None)[0]
    if is_main:
        for reason in skipped:
            print(f"checkpoint skipped, {reason}", file=sys.stderr, flush=True)
    if path is None:
        if skipped:
            raise CheckpointError(f"{run}: no checkpoint is valid ({skipped[0]}); restore one or use another --output")
        return None
    if accept is not None:
        accept(read_state(path))
    return load(path, engine)


def load(path: Path, engine: TrainEngine) -> RunState:
    """Set the engine to a (verified) checkpoint and return its run state; every rank must call it."""
    state = read_state(path)
    with _Reader(path) as reader:
        engine.load_named_state(reader.read, state.optimizer_steps)
    engine.loss_scale = state.loss_scale
    return state


def read_state(path: Path) -> RunState:
    content = json.loads((path / "state.json").read_text(encoding="utf-8"))
    known = {item.name for item in dataclasses.fields(RunState)}
    if unknown := set(content) - known:
        raise CheckpointError(f"{path}: state.json has unknown entries {sorted(unknown)}; written by a newer version?")
    return RunState(**content)


def resolve(path: Path) -> Path:
    """The checkpoint folder meant by a run folder (its newest valid one) or by a checkpoint folder itself.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if _NAME.fullmatch(path.name):
        reason = defect(path)
        if reason is not None:
            raise CheckpointError(f"{path}: {reason}; use another checkpoint")
        return path
    found, skipped = newest_valid(path)
    if found is None:
        why = f" ({'; '.join(skipped)})" if skipped else ""
        raise CheckpointError(
            f"{path}: found no valid checkpoint{why}; expected RUN/checkpoints/step_N of a training run"
        )
    return found


def load_weights(path: Path) -> dict[str, Tensor]:
    """fp32 weights by parameter name, from a run folder or a checkpoint folder, for use without an engine."""
    with _Reader(resolve(Path(path)), kinds=("weight",)) as reader:
        return {name: reader.read("weight", name) for name in reader.names("weight")}


class _Writer:
    """Collects tensors into files beside the final folder; the first OSError ends writing but not collecting."""

    def __init__(self, final: Path) -> None:
        self.error: OSError | SafetensorError | None = None
        self._final = final
        self._folder = final.with_name(final.name + ".tmp")
        self._pending: dict[str, dict[str, Tensor]] = {kind: {} for kind in KINDS}
        self._num_files = dict.fromkeys(KINDS, 0)
        self._files: dict[str, dict[str, Any]] = {}
        self._guard(self._start)

    def add(self, name: str, tensors: dict[str, Tensor]) -> None:
        for kind, tensor in tensors.items():
            pending = self._pending[kind]
            pending[name] = tensor
            if sum(t.nbytes for t in pending.values()) >= MAX_FILE_BYTES:
                self._guard(self._flush, kind)

    def finish(self, state: RunState) -> None:
        for kind in KINDS:
            self._guard(self._flush, kind)
        self._guard(self._publish, state)
        if self.error is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _guard(self, action, *arguments) -> None:
        if self.error is None:
            try:
                action(*arguments)
            except (OSError, SafetensorError) as error:
                self.error = error

    def _start(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)

    def _flush(self, kind: str) -> None:
        pending, self._pending[kind] = self._pending[kind], {}
        if pending:
            path = self._folder / f"{kind}-{self._num_files[kind]:05d}.safetensors"
            save_file(pending, path)
            self._num_files[kind] += 1
            self._seal(path)

    def _publish(self, state: RunState) -> None:
        path = self._folder / "state.json"
        path.write_text(json.dumps(dataclasses.asdict(state), indent=1), encoding="utf-8")
        self._seal(path)
        manifest = self._folder / "manifest.json"
        content = {"format_version": FORMAT_VERSION, "step": state.step, "files": self._files}
        manifest.write_text(json.dumps(content, indent=1), encoding="utf-8")
        _sync(manifest)
        _sync(self._folder)
        if self._final.exists():  # the same step again, after a fallback to an older checkpoint
            _remove(self._final)
        os.rename(self._folder, self._final)
        _sync(self._final.parent)

    def _seal(self, path: Path) -> None:
        _sync(path)
        self._files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}


class _Reader:
    """Memory-maps the tensors of a checkpoint; nothing is unpickled."""

    def __init__(self, path: Path, kinds: tuple[str, ...] = KINDS) -> None:
        self._path = path
        self._handles: dict[str, Any] = {}
        self._file_of: dict[tuple[str, str], str] = {}
        for kind in kinds:
            for file in sorted(path.glob(f"{kind}-[0-9]*.safetensors")):
                handle = self._handles[file.name] = safe_open(file, framework="pt")
                self._file_of |= {(kind, name): file.name for name in handle.keys()}  # noqa: SIM118 (not a dict)

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._handles.clear()

    def names(self, kind: str) -> list[str]:
        return [name for found, name in self._file_of if found == kind]

    def read(self, kind: str, name: str) -> Tensor:
        file = self._file_of.get((kind, name))
        if file is None:
            raise CheckpointError(
                f"{self._path}: holds no {kind} of {name}; it belongs to another model, use another --output"
            )
        return self._handles[file].get_tensor(name)


def _published(folder: Path) -> list[Path]:
    """Checkpoint folders by step, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def _retain(folder: Path, keep_last: int) -> None:
    for path in _published(folder)[:-keep_last]:
        _remove(path)


def _remove(path: Path) -> None:
    """Take a checkpoint out of sight in one move, then delete it."""
    aside = path.with_name(path.name + ".removed")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(path, aside)
    shutil.rmtree(aside, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def weights_hash(weights: dict[str, Tensor]) -> str:
    """SHA-256 over names and bytes of all weights in order of name: equal models have equal hashes."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
