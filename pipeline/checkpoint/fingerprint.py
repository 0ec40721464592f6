"""The fingerprint of a run: the settings and data that a resume must share, and the check that it does."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config.mistakes import of_other_choices
from pipeline.config.options import Config, ConfigError, in_batch_negatives, leaves, to_plain
from pipeline.config.task_options import TaskOptions, names_of_scoring

MAY_CHANGE = "data."  # with data.allow_change; a run with another model or batch size is another run
# Changes of this program that every run may go on over, said and recorded: name, was, is, and what it means.
_OF_THE_PROGRAM = (
    (
        "data.images.version",
        1,
        2,
        "what is transparent is white now, orientation in XMP counts; other images as before",
    ),
)


def run_fingerprint(config: Config, data: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that decides what a step computes, besides the number of steps; nothing that is about speed.

    ``data`` is what ``loading/open_data.py`` says of the data; an entry added there later is null where nothing is
    done that was not done before.

    What is done to captions besides tokenising follows from ``model.behaviour``. Where negatives come from the
    micro-batch, its size counts.
    """
    plain = to_plain(config)
    plain["model"]["vision"].pop("pretrained")
    plain["model"]["text"].pop("pretrained")
    plain["model"].pop("weights")
    plain["model"].pop("activation_checkpointing")
    for name in names_of_scoring(config.task):
        plain["task"].pop(name)
    optim = {"batch_size": config.optim.batch_size}
    if in_batch_negatives(config) is not None or config.model.connector.fewest_tokens is not None:
        optim["micro_batch_size"] = config.optim.micro_batch_size
    return json.loads(json.dumps({
        "model": plain["model"],
        "objective": plain["objective"],
        "task": plain["task"],
        "optim": optim,
        "data": data,
    }))  # fmt: skip


def accept(run: Path, saved: dict[str, Any], wanted: dict[str, Any], config: Config) -> dict[str, str]:
    """Differences between the run's fingerprint and the one of ``config``, name -> "was -> is", if they may be.

    An option that the run's fingerprint lacks, for it came later, has the value that means "as before": its default,
    unless it names another one (``model.config.option``). The run's options of other objectives mean nothing.

    Raises:
        ConfigError: there are differences and they are not allowed; the message names them.
    """
    old, new = dict(leaves(saved)), dict(leaves(wanted))
    sections = {"model.": config.model, "objective.": config.objective, "task.": config.task}
    before = json.loads(json.dumps({n: v for prefix, one in sections.items() for n, v in _before(one, prefix).items()}))
    before["task.name"] = TaskOptions.name  # runs begun before there were others pretrained
    foreign = of_other_choices(old, {name: new[name] for name in ("objective.name", "task.name")})
    old = {name: before[name] for name in new if name in before} | {n: old[n] for n in old if n not in foreign}
    names = [name for name in [*new, *(name for name in old if name not in new)] if old.get(name) != new.get(name)]
    found = {name: f"{_short(old.get(name))} -> {_short(new.get(name))}" for name in names}
    for name, was, now, meaning in _OF_THE_PROGRAM:
        if name in names and (old.get(name), new.get(name)) == (was, now):
            found[name] += f" ({meaning})"
            names.remove(name)
    final = [name for name in names if not name.startswith(MAY_CHANGE)]
    if final or (names and not config.data.allow_change):
        listed = final or names
        shown = "; ".join(f"{name} {found[name]}" for name in listed[:5])
        more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
        way = "" if final else ", or say --data.allow_change true to go on from the same position with other data"
        raise ConfigError(
            f"{run} holds a run with another {shown}{more}; continue with the same settings and data, start anew with "
            f"another --output{way}"
        )
    return found


def _before(section: Any, prefix: str) -> dict[str, Any]:
    """For each option of a dataclass the value that means "as before there was this option", by dotted name."""
    found, defaults = {}, type(section)()
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        if dataclasses.is_dataclass(value):
            found |= _before(value, f"{prefix}{item.name}.")
        else:
            found[f"{prefix}{item.name}"] = item.metadata.get("before", getattr(defaults, item.name))
    return found


def _short(value: Any) -> str:
    """A hash by its first digits."""
    return f"{value[:12]}.." if isinstance(value, str) and len(value) == 64 else str(value)
