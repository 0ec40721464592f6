"""Describes in words the settings that a resumed run changes, and refuses fewer steps than it has done."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config.options import Config, ConfigError, TrainConfig, flatten

# Not compared here: another batch size is refused (fingerprint.py), another micro-batch size is part of the topology.
NOT_COMPARED = {"optim.batch_size", "optim.micro_batch_size"}


def schedule_settings(config: Config) -> dict[str, Any]:
    """Settings that a resumed run may change and that then act on all further steps, by option name."""
    chosen = {f"optim.{name}": value for name, value in flatten(config.optim)}
    chosen |= {"train.steps": config.train.steps, "train.compile": config.train.compile}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in chosen.items()
        if name not in NOT_COMPARED
    }


def refuse_fewer_steps(output: Path, done: int, train: TrainConfig) -> None:
    """Raise ConfigError when a run is asked to end before the step it has reached."""
    if done > train.steps:
        asked, mend = f"train.steps is {train.steps}", f"--train.steps {done} or more"
        if train.epochs is not None:
            asked, mend = f"train.epochs {train.epochs:g} are {train.steps} steps", "more --train.epochs"
        raise ConfigError(f"{output} has done {done} steps, {asked}; use {mend}, or another --output")


def describe_changes(
    old_topology: Mapping[str, Any],
    new_topology: Mapping[str, Any],
    old_settings: Mapping[str, Any],
    new_settings: Mapping[str, Any],
) -> list[str]:
    """One line per difference between the settings of a resumed run and those it was trained with before.

    Another topology changes results by rounding only; another precision or setting changes the run from here on.
    """
    lines = []
    before, now = _in_words(old_topology), _in_words(new_topology)
    if old_topology and before != now:
        same_masks = old_topology.get("micro_batch_size") == new_topology.get("micro_batch_size")
        kept = "losses equal up to rounding" if same_masks else "other dropout masks, drawn per micro-batch"
        lines.append(f"another topology: {now} (was {before}); same samples, {kept}")
    old_precision, precision = old_topology.get("precision"), new_topology.get("precision")
    if old_topology and old_precision != precision:
        lines.append(f"another precision: {precision} (was {old_precision}); fp32 weights and moments are kept")
    for name in new_settings:
        if name in old_settings and old_settings[name] != new_settings[name]:
            lines.append(f"another {name}: {new_settings[name]} (was {old_settings[name]}), in force from here on")
    return lines


def _in_words(topology: Mapping[str, Any]) -> str:
    words = f"{topology.get('world_size')} ranks, ZeRO {topology.get('zero_stage')}"
    return f"{words}, micro-batches of {topology['micro_batch_size']}" if "micro_batch_size" in topology else words
