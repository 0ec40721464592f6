"""Has DeepSpeed read its JSON before anything is built, so that what it refuses is one line."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import deepspeed
from pydantic import ValidationError

from pipeline.deepspeed_json.ds_config import JsonProblems


def check_ds_config(ds_config: dict[str, Any], known: Sequence[str] = ()) -> None:
    """Raise JsonProblems with everything that DeepSpeed refuses of a resolved JSON, section by section, after what is
    ``known`` to be wrong with it; a section that this names is left to it."""
    # Without train_batch_size, which DeepSpeed compares with the number of ranks that it knows: none yet.
    content = {key: value for key, value in ds_config.items() if key != "train_batch_size"}
    sizes = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    needed = {key: content.get(key, 1) for key in sizes}  # one of them is missing where the sizes contradict each other
    problems = [problem for key in content for problem in _problems({key: content[key]} | needed, key)]
    if not problems and not known:
        problems = _problems(content, "the JSON")
    problems = [one for one in problems if not any(one.split(":", 1)[0] in other for other in known)]
    if problems or known:
        raise JsonProblems([*known, *problems], ds_config)


def _problems(content: dict[str, Any], section: str) -> list[str]:
    logger = deepspeed.utils.logger
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        deepspeed.DeepSpeedConfig(content)
    except ValidationError as error:
        return [_in_words(section, one) for one in error.errors()]
    except Exception as error:  # its reader raises whatever the content makes Python raise
        return [f"{section}: DeepSpeed refuses it ({' '.join(str(error).split()) or type(error).__name__})"]
    finally:
        logger.setLevel(level)
    return []


def _in_words(section: str, error: Any) -> str:
    """One complaint of pydantic: the key, what was found, what was expected."""
    place = ".".join(map(str, (section, *error["loc"])))
    if error["type"] == "extra_forbidden":
        return f"{place}: DeepSpeed has no such key; remove it"
    return f"{place}: found {str(error['input'])[:60]}, DeepSpeed says: {' '.join(error['msg'].split())}"
