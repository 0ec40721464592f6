"""The course of an export: load the run's model, write its folder, load that and compare, then give it its name."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_prep.manifest import sync_directory
from model.frozen import frozen_tensors
from model.weights.start import named_tensors
from pipeline.checkpoint.files import seal, step_of, weights_hash
from pipeline.checkpoint.restore import resolve
from pipeline.config.command_line import load_config
from pipeline.config.options import ConfigError
from pipeline.data.tokenizer import tokenizer_of
from pipeline.exported.folder import (
    ADAPTER,
    CARD,
    CONFIG,
    FORMAT_VERSION,
    LANGUAGE,
    MANIFEST,
    PROCESSOR,
    TOWER,
    with_own_hash,
)
from pipeline.exporting.card import Facts, model_card
from pipeline.exporting.comparing import first_difference, outputs_of, rounding
from pipeline.exporting.graphs import write_graphs
from pipeline.exporting.parts import (
    FORMAT,
    frozen_parts,
    processor_settings,
    trained_tensors,
    write_adapter,
    write_language,
    write_tower,
    write_tower_settings,
)
from pipeline.exporting.published import model_config, version
from pipeline.exporting.samples import Sample, batch_of, find_samples
from pipeline.exporting.source import Source, load_model
from pipeline.exporting.streaming import MAX_FILE_BYTES, write_tensors
from pipeline.exporting.tokenizers import write_tokenizer
from pipeline.finetuning.table import task_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PART = ".part"  # behind the name of a folder that is being written
KEPT_STATE = ("step", "samples_seen", "optimizer_steps")


@dataclass(frozen=True)
class Options:
    """How a model is exported. ``licence`` is an identifier of the Hugging Face hub, such as apache-2.0."""

    dtype: str = "float32"
    without_frozen: bool = False
    vision_tower: bool = False  # a trained tower too by its library's names
    onnx: bool = False
    torch_export: bool = False
    licence: str | None = None
    overwrite: bool = False
    max_file_bytes: int = MAX_FILE_BYTES


def export(source: Source, out: Path, options: Options) -> Facts:
    """Make the folder ``out``, whole or not at all; returns what the card says of it.

    Raises:
        ConfigError: ``out`` is taken, the weights do not fit the dtype, or what was written does not compute what the
            run's checkpoint computes.
        ValueError, OSError: the run is damaged, or the disk is full.
    """
    _refuse_taken(out, options.overwrite)
    partial = out.with_name(out.name + PART)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        facts = _write(source, partial, options)
        _compare(source, partial, facts)
        (partial / CARD).write_text(model_card(source, facts), encoding="utf-8")
        sync_directory(partial)
        _publish(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return facts


def _refuse_taken(out: Path, overwrite: bool) -> None:
    if step_of(out) is not None:
        raise ConfigError(f"{out}: step_N is the name of a checkpoint; choose another one")
    if out.is_symlink() or out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file or a link, expected a folder that is not there yet; choose another name")
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"{out} is there and not empty; choose another name, or give --overwrite")
    if not (out / MANIFEST).is_file():
        raise ConfigError(f"{out} is no exported folder (no {MANIFEST} in it), which is never overwritten; remove it")


def _write(source: Source, folder: Path, options: Options) -> Facts:
    """Everything but the card; afterwards the model is no longer held."""
    dtype = DTYPES[options.dtype]
    objective = source.load()
    samples, what = find_samples(source.config, source.task, source.tokenizer)
    outputs, change = _outputs(source, objective, samples), None
    if dtype != torch.float32:
        _round(objective, dtype, frozen_tensors(objective) if options.without_frozen else ())
        exact, outputs = outputs, _outputs(source, objective, samples)
        change = rounding(exact, outputs)
    facts = Facts(options.dtype, options.licence, samples, what, outputs, change, *_counted(objective))
    _refuse_small_disk(folder, objective, dtype)
    config, frozen = source.config.model, frozen_parts(objective)
    parts = [] if options.without_frozen else frozen
    write_tensors(folder, trained_tensors(objective, dtype), _metadata(source), options.max_file_bytes)
    if TOWER in parts or options.vision_tower:
        write_tower(objective.net.vision, config, folder, dtype)
    elif (config.vision.name or "").startswith("hf/") and TOWER not in frozen:
        write_tower_settings(objective.net.vision, config, folder)
    if LANGUAGE in parts:
        write_language(objective.net.language, folder, dtype)
        if config.language.lora_rank:
            write_adapter(objective.net.language, config.language, folder, dtype)
    write_tokenizer(source, folder)
    processor = processor_settings(objective.net.vision, config.vision.image_size)
    _write_json(folder / PROCESSOR, processor)
    files = {option: name for name, (_, option) in source.files.items()}
    for name, (path, _) in source.files.items():
        shutil.copyfile(path, folder / name)
    _write_json(folder / CONFIG, model_config(source.config, objective, options.dtype, parts, files, frozen))
    facts.graphs.extend(write_graphs(objective.net.vision, folder, samples, options.torch_export, options.onnx))
    facts.parts.extend(one for one in (TOWER, LANGUAGE, ADAPTER) if (folder / one).is_dir())
    _seal(source, objective, folder, bool(parts))
    return facts


def _seal(source: Source, objective: nn.Module, folder: Path, with_frozen: bool) -> None:
    """Write the manifest."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    state = dataclasses.asdict(source.state)
    kept = {name: state[name] for name in KEPT_STATE}
    kept["fingerprint"] = {"data": state["fingerprint"]["data"]} if "data" in state["fingerprint"] else {}
    if frozen := frozen_tensors(objective):
        where = "the exported folder" if with_frozen or not state["frozen"] else state["frozen"]["source"]
        kept["frozen"] = {"source": where, "names": sorted(frozen), "sha256": weights_hash(frozen)}
    content: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "openflm_version": version(),
        "checkpoint_sha256": source.sha256,
        "state": kept,
        "files": {name: seal(folder / name) for name in names},
    }
    (folder / MANIFEST).write_bytes(with_own_hash(content))
    seal(folder / MANIFEST)


def _compare(source: Source, folder: Path, facts: Facts) -> None:
    """Raise ConfigError unless the folder, read as anybody reads it, gives the outputs of the run's checkpoint."""
    try:
        config = load_config(resolve(folder))
        task, tokenizer = task_of(config), tokenizer_of(config)
        objective = load_model(config, task, tokenizer, folder)
        found = outputs_of(objective, batch_of(facts.samples, config, task, objective, tokenizer))
    except ValueError as error:
        raise ConfigError(f"nothing was exported: what was written cannot be read ({error})") from error
    if reason := first_difference(facts.outputs, found):
        raise ConfigError(
            f"nothing was exported: of {facts.compared_with}, {reason}; {source.checkpoint} is another model"
        )


def _publish(partial: Path, out: Path) -> None:
    """Give the folder its name; what was there goes."""
    aside = out.with_name(out.name + ".removed")
    shutil.rmtree(aside, ignore_errors=True)
    if out.exists():
        os.rename(out, aside)
    os.rename(partial, out)
    sync_directory(out.absolute().parent)
    shutil.rmtree(aside, ignore_errors=True)


def _outputs(source: Source, objective: nn.Module, samples: list[Sample]) -> dict[str, Tensor]:
    return outputs_of(objective, batch_of(samples, source.config, source.task, objective, source.tokenizer))


@torch.no_grad()
def _round(objective: nn.Module, dtype: torch.dtype, kept: Container[str]) -> None:
    """Round all weights but those ``kept`` in place; raises ConfigError for one that the dtype cannot hold."""
    for name, value in named_tensors(objective):
        if value.is_floating_point() and name not in kept:
            rounded = value.to(dtype).to(value.dtype)
            if not torch.equal(torch.isfinite(rounded), torch.isfinite(value)):
                raise ConfigError(f"{name} has values that {str(dtype)[6:]} cannot hold; use --dtype bfloat16")
            value.copy_(rounded)


def _refuse_small_disk(folder: Path, objective: nn.Module, dtype: torch.dtype) -> None:
    needed = sum(value.numel() * dtype.itemsize for _, value in named_tensors(objective))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"{folder.parent}: {needed / 2**30:.1f} GiB are needed, {free / 2**30:.1f} are free")


def _counted(objective: nn.Module) -> tuple[int, int]:
    """Numbers of weights: trained ones, frozen ones."""
    frozen = frozen_tensors(objective)
    numbers = [
        sum(v.numel() for n, v in objective.named_parameters() if (n in frozen) == kept) for kept in (False, True)
    ]
    return numbers[0], numbers[1]


def _metadata(source: Source) -> dict[str, str]:
    task, objective = source.config.task.name, source.config.objective.name
    return FORMAT | {"library": "openflm", "task": task, "objective": objective, "step": str(source.state.step)}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
