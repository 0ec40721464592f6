"""What the line that refuses a mistake tells to do, done: it is accepted, or another mistake is named."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.command_line import parse_command_line
from pipeline.config.options import ConfigError
from pipeline.distributed.places import Place
from pipeline.training.session import resolve_ds_config

Json = dict[str, Any]
SIZES = ["--recipe", "flm_tiny", "--optim.batch_size", "16", "--optim.micro_batch_size", "4"]


def put(key: str, value: Any) -> Callable[[Json, list[str]], None]:
    """The fix that writes ``value`` to a dotted key of the JSON."""

    def apply(given: Json, words: list[str]) -> None:
        *above, last = key.split(".")
        for name in above:
            given = given.setdefault(name, {})
        given[last] = value

    return apply


def remove(*keys: str) -> Callable[[Json, list[str]], None]:
    def apply(given: Json, words: list[str]) -> None:
        for key in keys:
            *above, last = key.split(".")
            section = given
            for name in above:
                section = section[name]
            del section[last]

    return apply


def say(*options: str) -> Callable[[Json, list[str]], None]:
    return lambda given, words: words.extend(options)


def both(*fixes: Callable[[Json, list[str]], None]) -> Callable[[Json, list[str]], None]:
    def apply(given: Json, words: list[str]) -> None:
        for fix in fixes:
            fix(given, words)

    return apply


def refusal(given: Json, words: list[str], folder: Path, ranks: int = 1) -> str | None:
    """What a training says to these settings on CPUs; None if it takes them."""
    path = folder / "ds.json"
    path.write_text(json.dumps(given))
    try:
        launch = parse_command_line([*SIZES, "--deepspeed", str(path), *words])
        resolve_ds_config(launch, Place(0, ranks, 0, "environment", ranks), torch.device("cpu"))
    except ConfigError as error:
        return str(error)
    return None


# JSON, options, what the message advises, the advice done
ADVICE: list[tuple[Json, list[str], str, Callable[[Json, list[str]], None]]] = [
    (
        {"fp16": {"enabled": True}, "zero_optimization": {"stage": 1}}, [],
        'write "auto" as fp16.enabled in the DeepSpeed JSON and use --train.precision bf16 or fp32',
        both(put("fp16.enabled", "auto"), say("--train.precision", "bf16")),
    ),
    (
        {"fp16": {"enabled": True}, "zero_optimization": {"stage": 1}}, ["--train.precision", "bf16"],
        "use --train.precision fp16", say("--train.precision", "fp16"),
    ),
    (
        {"zero_optimization": {"stage": 1}}, ["--train.precision", "fp16"],
        "use --train.precision bf16 or fp32", say("--train.precision", "fp32"),
    ),
    (
        {"bf16": {"enabled": True}}, [], "ds_configs/zero1.json", put("zero_optimization", {"stage": 1}),
    ),
    (
        {"bf16": {"enabled": True}}, [],
        'write "auto" as bf16.enabled in the DeepSpeed JSON and use --train.precision fp32',
        both(put("bf16.enabled", "auto"), say("--train.precision", "fp32")),
    ),
    ({"bf16": {"enabled": True}, "fp16": {"enabled": True}, "zero_optimization": {"stage": 1}}, [], "enable one",
     put("fp16.enabled", False)),
    ({"bf16": True, "zero_optimization": {"stage": 1}}, [], 'like {"enabled": true}', put("bf16", {"enabled": True})),
    ({"zero_optimization": True}, [], 'like {"stage": 2}', put("zero_optimization", {"stage": 2})),
    ({"zero_optimization": {"stage": 4}}, [], "expected 0, 1, 2 or 3", put("zero_optimization.stage", 3)),
    ({"optimizer": "AdamW"}, [], 'like {"type": "AdamW"}', put("optimizer", {"type": "AdamW"})),
    ({"optimizer": {"type": "Adam"}}, [], "remove the optimizer block", remove("optimizer")),
    ({"optimizer": {"type": "AdamW", "params": {"lr": 1.0}}}, [], 'write "auto" in the JSON',
     put("optimizer.params.lr", "auto")),
    ({"train_batch_size": 7}, [], 'write "auto" in the JSON', put("train_batch_size", "auto")),
    ({"gradient_clipping": 3.0}, [], 'optim.clip_grad_norm gives 0.0; write "auto" in the JSON',
     put("gradient_clipping", "auto")),
    ({"scheduler": {"type": "WarmupLR"}}, [], "remove it and use optim.schedule", remove("scheduler")),
    ({"amp": {"enabled": True}}, [], "remove it and choose by --train.precision",
     both(remove("amp"), say("--train.precision", "fp32"))),
    ({"torch_autocast": {"enabled": True}}, [], "remove it", remove("torch_autocast")),
    ({"compile": {"enabled": True}}, [], "use --train.compile true",
     both(remove("compile"), say("--train.compile", "true"))),
    ({"bfloat16": {"enabled": True}, "zero_optimization": {"stage": 1}}, [], "write bf16",
     both(remove("bfloat16"), put("bf16.enabled", True))),
    ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, [], 'write "offload_optimizer": {"device": "cpu"}',
     both(remove("zero_optimization.cpu_offload"), put("zero_optimization.offload_optimizer", {"device": "cpu"}))),
    ({"zero_optimization": {"stage": 3, "cpu_offload_param": True}}, [], 'write "offload_param": {"device": "cpu"}',
     both(remove("zero_optimization.cpu_offload_param"), put("zero_optimization.offload_param", {"device": "cpu"}))),
    ({"zero_optimization": {"stage": 3, "stage3_gather_fp16_weights_on_model_save": True}}, [],
     'write "stage3_gather_16bit_weights_on_model_save"',
     both(remove("zero_optimization.stage3_gather_fp16_weights_on_model_save"),
          put("zero_optimization.stage3_gather_16bit_weights_on_model_save", True))),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, [], "use cpu or none",
     put("zero_optimization.offload_optimizer.device", "cpu")),
    ({"zero_optimisation": {"stage": 2}}, [], "did you mean zero_optimization?",
     both(remove("zero_optimisation"), put("zero_optimization", {"stage": 2}))),
    ({"tensor_parallel": {"autotp_size": 2}}, [], "remove it", remove("tensor_parallel")),
    ({"data_types": {"grad_accum_dtype": "int8"}}, [], "expected one of fp32",
     put("data_types.grad_accum_dtype", "fp32")),
    ({"zero_optimization": {"stage": 2, "stages": 2}}, [], "DeepSpeed has no such key; remove it",
     remove("zero_optimization.stages")),
    ({}, ["--optim.micro_batch_size", "5"], "use --optim.micro_batch_size 4", say("--optim.micro_batch_size", "4")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "words", "advice", "fix"),
    ADVICE,
    ids=lambda value: value.__name__ if callable(value) else str(value)[:50],
)
def test_advice_that_is_followed_once_succeeds(
    given: Json, words: list[str], advice: str, fix: Callable[[Json, list[str]], None], tmp_path: Path
) -> None:
    found = refusal(given, words, tmp_path)
    assert found is not None and advice in found, found
    mended, options = copy.deepcopy(given), list(words)
    fix(mended, options)
    after = refusal(mended, options, tmp_path)
    circles = (  # fp16 on a CPU is refused whatever the JSON says of it, in another line
        "fp16 cannot train on a CPU",
    )
    assert after is None or (after != found and any(line in after for line in circles)), after


def test_the_batch_that_is_advised_is_taken(tmp_path: Path) -> None:
    for ranks in (1, 2, 3, 5, 7):
        words: list[str] = []
        for _ in range(3):  # a batch size, then a micro-batch
            found = refusal({}, words, tmp_path, ranks)
            if found is None:
                break
            option, value = re.findall(r"use (--optim\.\w+) (\d+)", found)[0]
            words += [option, value]
        assert found is None, (ranks, words, found)


def test_everything_wrong_stands_in_one_line(tmp_path: Path) -> None:
    """Types, values, keys that DeepSpeed alone knows to be wrong; mended all at once, nothing is left."""
    given = {
        "bf16": True,
        "optimizer": {"type": "Adam"},
        "scheduler": {"type": "WarmupLR"},
        "zero_optimization": {"stage": 2, "stages": 3},
        "train_batch_size": 7,
        "aio": {"block_size": "large"},
    }
    found = refusal(given, ["--train.precision", "fp16"], tmp_path)
    assert found is not None
    parts = ("bf16: found true", "only AdamW", "scheduler: not supported", "zero_optimization.stages",
             "train_batch_size is", "aio.block_size", "fp16 cannot train on a CPU")  # fmt: skip
    assert f"{len(parts)} things to mend" in found and all(part in found for part in parts), found
    assert refusal({"zero_optimization": {"stage": 2}}, [], tmp_path) is None
