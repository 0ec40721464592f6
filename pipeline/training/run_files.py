"""What the folder of a run holds from its start: how it was asked for, where it runs, what it reads texts by."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.manifest import write_atomically
from pipeline.config.command_line import Launch
from pipeline.config.options import Config, flatten, save_config
from pipeline.data.tokenizer_source import tokenizer_source
from pipeline.distributed.connecting import Ranks
from pipeline.recording.environment import describe_environment
from pipeline.tasks.task import Score


def write_run_files(
    launch: Launch,
    ds_config: dict[str, Any],
    ranks: Ranks,
    num_parameters: int,
    precision: str,
    starting: dict[str, Any] | None,
    scores: Sequence[Score],
) -> None:
    """Settings, DeepSpeed's JSON, environment and tokenizer of a run; by rank 0, each time the run is started."""
    output, place = launch.output, ranks.place
    output.mkdir(parents=True, exist_ok=True)
    save_config(launch.config, output / "config.yaml")
    (output / "ds_config.json").write_text(json.dumps(ds_config, indent=2) + "\n", encoding="utf-8")
    environment = {
        "recipe": launch.recipe,
        "world_size": place.world_size,
        "launcher": place.launcher,
        "precision": precision,
        "num_parameters": num_parameters,
        "starting_weights": starting or _recorded_start(output / "environment.json"),
        "better": {score.name: "higher" if score.higher_is_better else "lower" for score in scores},
        "sources": launch.sources,
        "threads": dict(ranks.threads),
        **describe_environment(ranks.device),
    }
    (output / "environment.json").write_text(json.dumps(environment, indent=2) + "\n", encoding="utf-8")
    copy_tokenizer(tokenizer_source(launch.config), output)


def _recorded_start(environment: Path) -> dict[str, Any] | None:
    """What the first part of a run noted of its starting weights; None where nothing is to be read."""
    try:
        return json.loads(environment.read_text(encoding="utf-8")).get("starting_weights")
    except (OSError, ValueError, AttributeError):
        return None


def copy_tokenizer(source: str | Path, output: Path) -> None:
    """RUN/tokenizer, whole or not there: a run that is killed while it copies does it again."""
    final, beside = output / "tokenizer", output / "tokenizer.tmp"
    if Path(source).is_dir() and not final.exists():
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(source, beside, ignore=_not_of_a_tokenizer)
        os.rename(beside, final)


def copy_files(names: Mapping[str, str], config: Config, output: Path) -> None:
    """A copy in the run folder of each file of the task's that an option names; what is there stays."""
    options = dict(flatten(config))
    for name, option in names.items():
        if options[option] is not None and not (output / name).exists():
            write_atomically(output / name, Path(options[option]).read_text(encoding="utf-8"))


def _not_of_a_tokenizer(folder: str, names: list[str]) -> list[str]:
    """What a model's folder holds besides its tokenizer: weights above all."""
    kept = (".json", ".txt", ".model", ".jinja")
    return [name for name in names if not name.endswith(kept) or (Path(folder) / name).is_dir()]
