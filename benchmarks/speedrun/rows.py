"""Reads the rows of a speedrun: each is the configuration of one training, refused here before anything trains."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.build import build_objective
from model.config import Vocabulary
from pipeline.config.command_line import parse_command_line
from pipeline.config.options import Config, ConfigError, leaves
from pipeline.config.recipes import read_yaml
from pipeline.weights.packaged import use_packaged_weights

FOLDER = Path(__file__).resolve().parent / "rows"
SHARE = "budget_share"
TAKEN = {  # options that a row may not set, and what sets them
    "train.steps": "the budget",
    "train.seed": "--seeds",
    "train.eval_every": "the speedrun: held-out losses are taken at both ends, off the clock",
    "train.save_every": "--evaluations",
    "train.keep_every": "--evaluations",
    "train.keep_last": "--evaluations",
    "train.save_minutes": "--evaluations",
    "train.async_save": "the speedrun: checkpoints are written off the clock",
    "data.paths": "--data",
    "data.train_split": "the recipe: probes are fitted on it, all rows on the same",
    "data.eval_split": "the recipe: probes are tested on it, all rows on the same",
    "data.tokenizer": "the recipe: one for all rows",
    "data.max_text_length": "the recipe: one for all rows",
    "model.vision.image_size": "the recipe: one for all rows",
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Row:
    """One configuration: ``options`` are those the row sets, ``config`` all of them, resolved."""

    name: str
    options: dict[str, Any]
    budget_share: float
    config: Config

    @property
    def arguments(self) -> list[str]:
        """The row's options as words of a command line."""
        return as_arguments(self.options)


def load_rows(name: str, base: Sequence[str], only: Sequence[str] | None = None) -> list[Row]:
    """The rows of benchmarks/speedrun/rows/NAME.yaml or of a YAML file, on top of the command line ``base``.

    Raises:
        ConfigError: no such file, no rows, an option that does not exist, may not be set here or has a wrong value.
    """
    path = _find(name)
    written = _read(path)
    if only:
        missing = [row for row in only if row not in written]
        if missing:
            raise ConfigError(f"--only: found {missing[0]!r}, expected rows of {path.name}: {', '.join(written)}")
        written = {row: written[row] for row in written if row in only}
    return [_row(path, row, content, base) for row, content in written.items()]


def with_packaged_weights(rows: Sequence[Row]) -> list[Row]:
    """The rows with the paths of weights that they name by package; identities keep the names.

    Raises:
        ConfigError: a package is not installed, or a row begins with a file or folder that is not there.
    """
    found = copy.deepcopy(list(rows))
    for row in found:
        use_packaged_weights(row.config)
        _check_paths(row)
    return found


def check_models(rows: Sequence[Row], vocabulary: Vocabulary) -> None:
    """Raise ConfigError for a row whose rates or sizes the model refuses; nothing is allocated."""
    for row in rows:
        try:
            with torch.device("meta"):
                length = row.config.data.max_text_length
                build_objective(row.config.model, row.config.objective, vocabulary, length)
        except ValueError as error:
            raise ConfigError(f"row {row.name}: {error}") from None


def _check_paths(row: Row) -> None:
    """Raise ConfigError where its training would, after those of other rows; names of a hub are not looked up."""
    model = row.config.model
    begun = {
        "weights": model.weights,
        "vision.pretrained": model.vision.pretrained,
        "text.pretrained": model.text.pretrained,
        "language.name": model.language.name,
        "connector.pretrained": model.connector.pretrained,
    }
    for option, named in begun.items():
        is_path = option == "weights" or (named or "").startswith((".", "/"))
        if named and is_path and not Path(named).exists():
            raise ConfigError(
                f"row {row.name}: model.{option}: found no {named}; make it, or name other rows by --only"
            )


def as_arguments(options: dict[str, Any]) -> list[str]:
    """{dotted option: value} as ``--option=value``."""
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in options.items()]


def _find(name: str) -> Path:
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in FOLDER.glob("*.yaml")))
        raise ConfigError(f"--rows: found no file for {name!r}; expected a YAML file or one of {known}")
    return path


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """{row: its settings by dotted option}."""
    content = read_yaml(path)
    if not content or not all(isinstance(row, dict) and row for row in content.values()):
        raise ConfigError(f"{path}: expected rows, each `NAME:` and under it `option: value` lines")
    for name in content:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigError(f"{path}: row name {name!r}: expected letters, digits, `_`, `-` and `.`")
    return {name: dict(leaves(row)) for name, row in content.items()}


def _row(path: Path, name: str, content: dict[str, Any], base: Sequence[str]) -> Row:
    options = {key: value for key, value in content.items() if key != SHARE}
    share = content.get(SHARE, 1)
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1:
        raise ConfigError(f"{path}: row {name}: {SHARE}: found {share!r}, expected a number above 0, at most 1")
    for key in options:
        if key in TAKEN:
            raise ConfigError(f"{path}: row {name}: {key} is set by {TAKEN[key]}; take it out of the row")
    try:
        launch = parse_command_line([*base, *as_arguments(options)])
    except ConfigError as error:
        raise ConfigError(f"{path}: row {name}: {str(error).removeprefix('command line: ')}") from None
    return Row(name, options, float(share), launch.config)


def target_rows(rows: Sequence[Row], named: Sequence[str] | None) -> list[str]:
    """The rows whose best end is the target: those named, else those of MLM that have the whole budget."""
    if missing := [name for name in named or () if name not in {row.name for row in rows}]:
        raise ConfigError(f"--target: found {missing[0]!r}, expected rows: {', '.join(row.name for row in rows)}")
    return list(named or (row.name for row in rows if row.config.objective.name == "mlm" and row.budget_share == 1))
