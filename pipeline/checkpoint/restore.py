"""Restores a run from its newest valid checkpoint, after checking that it belongs to the run.

A checkpoint does not depend on the topology (``files.py``): any number of ranks at any ZeRO stage can read it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from model.frozen import frozen_source, frozen_tensors, persistent_buffers
from pipeline.checkpoint.files import (
    KINDS,
    STATE,
    CheckpointError,
    defect,
    newest_valid,
    published,
    read_json_bytes,
    step_of,
    weights_hash,
)
from pipeline.checkpoint.reading import Reader
from pipeline.checkpoint.state import RunState, TrainingState
from pipeline.checkpoint.verify import newest_whole
from pipeline.distributed.ranks import Agreement
from pipeline.exported import folder as exported
from pipeline.exported.tensors import ExportedWeights


def find(run: Path, agreement: Agreement, is_main: bool) -> Path | None:
    """The newest valid checkpoint of a run, None when it has none yet; every rank must call it.

    The ranks divide the files among themselves to verify them.

    Raises:
        CheckpointError: there are checkpoints but none is valid.
    """
    path, skipped = newest_whole(published(run)[::-1] if is_main else [], agreement)
    if is_main:
        for reason in skipped:
            print(f"checkpoint skipped, {reason}", file=sys.stderr, flush=True)
    if path is None and skipped:
        raise CheckpointError(f"{run}: no checkpoint is valid ({skipped[0]}); restore one or use another --output")
    return path


def resume(
    run: Path,
    engine: TrainingState,
    agreement: Agreement,
    is_main: bool,
    accept: Callable[[RunState], None] | None = None,
) -> RunState | None:
    """Continue from the newest valid checkpoint; None when the run has none yet. Every rank must call it.

    ``accept`` sees the saved state before anything is loaded, and raises where it belongs to another run.

    Raises:
        CheckpointError: there are checkpoints but none is valid.
    """
    path = find(run, agreement, is_main)
    if path is None:
        return None
    if accept is not None:
        accept(read_state(path))
    return load(path, engine, agreement)


def load(path: Path, engine: TrainingState, agreement: Agreement | None = None) -> RunState:
    """Load a (verified) checkpoint into the engine and return its run state; every rank must call it.

    Weights, moments and counters of the engine are overwritten. Each rank reads what its engine holds, and with an
    ``agreement`` the headers of its share of the files instead of all.

    Raises:
        CheckpointError: the checkpoint is of another model, or was trained with other frozen weights.
    """
    state = read_state(path)
    _refuse_other_frozen(path, state.frozen, engine.frozen)
    reader = Reader(path, agreement=agreement)
    for kind in KINDS:
        expected = engine.shapes(kind, bool(state.optimizer_steps))
        _refuse_other_names(path, kind, reader.shapes(kind), expected)
    engine.load_named_state(reader.read_ranges, state.optimizer_steps)
    engine.loss_scale, engine.skipped_steps = state.loss_scale, state.skipped_steps
    return state


def read_state(path: Path) -> RunState:
    """The run state of a checkpoint; raises CheckpointError for one that this program cannot have written."""
    try:
        content = exported.run_state(path) if exported.is_exported(path) else json.loads(read_json_bytes(path / STATE))
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: state.json is not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: state.json holds a {type(content).__name__}, expected an object")
    known = {item.name for item in dataclasses.fields(RunState)}
    if unknown := set(content) - known:
        raise CheckpointError(f"{path}: state.json has unknown entries {sorted(unknown)}; written by a newer version?")
    state, default = RunState(**content), RunState()
    for name in content:
        found, usual = getattr(state, name), getattr(default, name)
        expected = dict if usual is None else type(usual)
        if type(found) is not expected and not (usual is None and found is None):
            raise CheckpointError(f"{path}: state.json has {name} {found!r}, expected {expected.__name__}")
    if state.frozen is not None and not _refers_to_weights(state.frozen):
        raise CheckpointError(f"{path}: state.json has frozen {state.frozen!r}, expected source, names and sha256")
    counters = (state.samples_seen, state.optimizer_steps, state.skipped_steps)
    if step_of(path) not in (None, state.step) or min(counters) < 0:
        raise CheckpointError(f"{path}: state.json is of step {state.step}, sample {state.samples_seen}")
    return state


def _refers_to_weights(frozen: dict[str, Any]) -> bool:
    names, texts = frozen.get("names"), (frozen.get("source"), frozen.get("sha256"))
    return isinstance(names, list) and bool(names) and all(isinstance(text, str) for text in (*names, *texts))


def resolve(path: Path) -> Path:
    """The checkpoint folder meant by a run folder (its newest valid one) or itself; an exported folder means itself.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if exported.is_exported(path):
        if reason := exported.defect(path):
            raise CheckpointError(f"{path}: {reason}; {exported.AGAIN}")
        return path
    if step_of(path) is not None:
        if reason := defect(path):
            raise CheckpointError(f"{path}: {reason}; use another checkpoint")
        return path
    if path.is_file():
        raise CheckpointError(f"{path}: is a file; expected a run folder or RUN/checkpoints/step_N (nothing was read)")
    found, skipped = newest_valid(path)
    if found is None:
        why = f" ({'; '.join(skipped)})" if skipped else ""
        raise CheckpointError(
            f"{path}: found no valid checkpoint{why}; expected RUN/checkpoints/step_N of a training run"
        )
    return found


def load_weights(path: Path, frozen: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """fp32 weights by parameter name, from a run folder or a checkpoint folder, for use without an engine.

    ``frozen`` are the weights that the run did not train, by name, for a checkpoint that refers to such weights.

    Raises:
        CheckpointError: no whole checkpoint, or ``frozen`` is not what it refers to.
    """
    return weights_in(resolve(Path(path)), frozen)


def weights_in(path: Path, frozen: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The same of a checkpoint folder that is known to be whole (``resolve``)."""
    found = None
    if frozen:
        found = {"source": "the frozen weights given", "names": sorted(frozen), "sha256": weights_hash(frozen)}
    saved = read_state(path).frozen
    if saved and not frozen:
        raise CheckpointError(
            f"{path}: holds the trained weights only; {len(saved['names'])} frozen ones of {saved['source']} are "
            f"referred to (first: {saved['names'][0]}); load that source too"
        )
    _refuse_other_frozen(path, saved, found)
    reader = ExportedWeights(path) if exported.is_exported(path) else Reader(path, kinds=("weight",))
    return dict(reader.read_all("weight")) | dict(frozen or {})


def load_into(model: nn.Module, path: Path) -> None:
    """Gives a model, built without an engine, the weights of a checkpoint folder that is known to be whole.

    Frozen parts of the model must have theirs already.

    Raises:
        CheckpointError: it is of a model of other parts, width, vocabulary or resolution, or was trained with other
            frozen weights.
    """
    frozen = frozen_tensors(model)
    _refuse_other_frozen(path, read_state(path).frozen, describe_frozen(model))
    reader = ExportedWeights(path) if exported.is_exported(path) else Reader(path, kinds=("weight",))
    own = [*model.named_parameters(), *persistent_buffers(model)]  # a shared tensor once, as checkpoints have it
    expected = {name: tuple(value.shape) for name, value in own if name not in frozen}
    fix = "restore the config.yaml and tokenizer it was trained with"
    _refuse_other_names(path, "weight", reader.shapes("weight"), expected, fix)
    model.load_state_dict(dict(reader.read_all("weight")), strict=False)


def describe_frozen(model: nn.Module) -> dict[str, Any] | None:
    """Source, names and SHA-256 of what is not trained; None when all is."""
    if not (frozen := frozen_tensors(model)):
        return None
    return {"source": frozen_source(model), "names": sorted(frozen), "sha256": weights_hash(frozen)}


def _refuse_other_frozen(path: Path, saved: dict[str, Any] | None, found: dict[str, Any] | None) -> None:
    """Raise CheckpointError unless the frozen weights ``found`` are those that the checkpoint was trained with."""
    names_saved, names_found = (set(one["names"]) if one else set() for one in (saved, found))
    if difference := _difference(names_saved, names_found):
        raise CheckpointError(f"{path}: frozen weights: {difference}; use the same model or another --output")
    if saved and found and saved["sha256"] != found["sha256"]:
        raise CheckpointError(
            f"{path}: was trained with frozen weights of {saved['source']} with SHA-256 {saved['sha256']}; "
            f"found {found['source']} with {found['sha256']}; restore the former, or start anew with another --output"
        )


def _refuse_other_names(
    path: Path,
    kind: str,
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    fix: str = "use another --output",
) -> None:
    """Raise CheckpointError unless the checkpoint's tensors of one kind are exactly the model's."""
    if difference := _difference(expected, found):
        raise CheckpointError(f"{path}: {kind}: {difference}; it belongs to another model, {fix}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise CheckpointError(
                f"{path}: {kind} of {name} has shape {list(found[name])}, the model's {list(shape)}; "
                f"it belongs to another model, {fix}"
            )


def _difference(expected: Iterable[str], found: Iterable[str]) -> str:
    """Missing and unexpected names in words; empty when there are none."""
    parts = []
    for word, names in (("missing", set(expected) - set(found)), ("unexpected", set(found) - set(expected))):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{word} {', '.join(sorted(names)[:3])}{more}")
    return "; ".join(parts)
