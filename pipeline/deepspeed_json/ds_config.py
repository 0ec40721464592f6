"""DeepSpeed's JSON: fills in every "auto" from the recipe and refuses what contradicts it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.options import Config, ConfigError, OptimConfig, accumulation_steps, leaves
from pipeline.deepspeed_json.ds_schema import AUTO, type_problems, unsupported, without, without_nulls


@dataclass(frozen=True)
class Device:
    """What the resolver must know of the hardware: ``kind`` cuda or cpu, and whether it computes in bf16."""

    kind: str
    has_bf16: bool


def read_ds_config(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_without_repeats)
    except _RepeatedKey as key:
        raise ConfigError(f"--deepspeed {path}: {key} stands there twice; remove one") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--deepspeed {path}: not a readable JSON file ({error}); see ds_configs/") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--deepspeed {path}: found a {type(content).__name__}, expected an object; see ds_configs/")
    return content


class _RepeatedKey(Exception):
    """A key that an object of the JSON has twice: the last would win without a word."""


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise _RepeatedKey(name)
    return dict(pairs)


def resolve(given: dict[str, Any], config: Config, world_size: int, device: Device) -> dict[str, Any]:
    """The JSON DeepSpeed gets: no "auto" left, ``gradient_clipping`` written (DeepSpeed clips at 1.0 without it).

    Raises:
        JsonProblems: everything that is wrong with it.
    """
    resolved = without_nulls(copy.deepcopy(given))
    wrong = list(type_problems(resolved))
    resolved = without(resolved, (key for key, _ in wrong))
    problems = [f"{key}: {problem}" for key, problem in wrong]
    problems += unsupported(resolved)
    problems += _resolve_sizes(resolved, config.optim, world_size)
    problems += _resolve_zero(resolved)
    problems += _resolve_precision(resolved, config.train.precision, device)
    if resolved["bf16"]["enabled"] or resolved["fp16"]["enabled"]:  # else micro-batches are summed in 8 or 11 bits
        resolved.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    problems += _optimizer_problems(resolved.pop("optimizer", AUTO), config.optim)
    resolved.pop("scheduler", None)
    resolved.setdefault("steps_per_print", 10**9)  # our own log says more
    left = [key for key, value in leaves(resolved) if value == AUTO]
    if left:
        problems.append(f'the recipe does not own {", ".join(left)}; write values instead of "auto"')
    if problems:
        raise JsonProblems(problems, resolved)
    return resolved


class JsonProblems(ConfigError):
    """Everything that is wrong with a DeepSpeed JSON; ``resolved`` is what is right of it."""

    def __init__(self, problems: list[str], resolved: dict[str, Any]) -> None:
        several = f"{len(problems)} things to mend: " if len(problems) > 1 else ""
        super().__init__(f"--deepspeed: {several}{' | '.join(problems)}")
        self.problems, self.resolved = problems, resolved


def _resolve_sizes(resolved: dict[str, Any], optim: OptimConfig, world_size: int) -> Iterator[str]:
    """Write what the recipe says of the batch and of clipping; yields what contradicts it."""
    owned = {
        "train_batch_size": (optim.batch_size, "optim.batch_size"),
        "train_micro_batch_size_per_gpu": (optim.micro_batch_size, "optim.micro_batch_size"),
        "gradient_clipping": (optim.clip_grad_norm, "optim.clip_grad_norm"),
    }
    try:
        fix = "optim.batch_size, optim.micro_batch_size and the number of ranks"
        owned["gradient_accumulation_steps"] = (accumulation_steps(optim, world_size), fix)
    except ConfigError as error:
        yield str(error)
    for key, (value, option) in owned.items():
        found = resolved.get(key, AUTO)
        if found not in (AUTO, value):
            yield f'{key} is {found} but {option} gives {value}; write "auto" in the JSON'
        resolved[key] = value


def _resolve_zero(resolved: dict[str, Any]) -> Iterator[str]:
    """Make the section of ZeRO definite: "auto" is DeepSpeed's default there; yields what is not supported."""
    zero = resolved["zero_optimization"] = _without_autos(resolved.get("zero_optimization", {}))
    stage = zero["stage"] = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        yield f"zero_optimization.stage: found {stage}, expected 0, 1, 2 or 3"
    else:
        zero["stage"] = int(stage)
    for kind in ("offload_optimizer", "offload_param"):
        device = zero.get(kind, {}).get("device", "none")
        if device not in ("none", "cpu"):
            yield f"zero_optimization.{kind}.device: {device} is not supported; use cpu or none"
    if zero.get("offload_optimizer", {}).get("device") == "cpu":
        resolved.setdefault("zero_force_ds_cpu_optimizer", False)  # torch's fused CPU AdamW serves


def _resolve_precision(resolved: dict[str, Any], wanted: str, device: Device) -> Iterator[str]:
    """Switch bf16 and fp16 on or off; yields what contradicts the recipe or the device."""
    try:
        precision = choose_precision(resolved, wanted, resolved["zero_optimization"]["stage"], device)
    except ConfigError as error:
        yield str(error)
        precision = "fp32"
    for name in ("bf16", "fp16"):
        section = _without_autos(resolved.get(name, {})) if name in ("bf16", precision) else {}
        resolved[name] = section | {"enabled": precision == name}


def _without_autos(section: dict[str, Any]) -> dict[str, Any]:
    """A section as DeepSpeed reads it, which takes its default for a key that is "auto"."""
    return {
        key: _without_autos(value) if isinstance(value, dict) else value
        for key, value in section.items()
        if value != AUTO
    }


def choose_precision(given: dict[str, Any], wanted: str, stage: int, device: Device) -> str:
    """fp32, bf16 or fp16 from the recipe's ``train.precision`` and the JSON, which must not contradict each other."""
    fixed = {name: given.get(name, {}).get("enabled", AUTO) for name in ("bf16", "fp16")}
    on = [name for name, value in fixed.items() if value is True]
    if len(on) > 1:
        raise ConfigError("bf16 and fp16 are both enabled; enable one")
    forced = on[0] if on else "fp32" if all(value is False for value in fixed.values()) else None
    if wanted == "auto":
        allowed = device.kind == "cuda" and device.has_bf16 and stage > 0 and fixed["bf16"] is not False
        wanted = forced or ("bf16" if allowed else "fp32")
    elif forced not in (None, wanted) or fixed.get(wanted) is False:
        found = f"enables {forced}" if forced else f"disables {wanted}"
        raise ConfigError(
            f"train.precision is {wanted} but the DeepSpeed JSON {found}; "
            f'write "auto" as enabled in the JSON or use --train.precision {forced or "auto"}'
        )
    instead = "use --train.precision "
    if forced == wanted:  # the JSON chose it, and would contradict another choice of ours
        instead = f'write "auto" as {wanted}.enabled in the DeepSpeed JSON and {instead}'
    if wanted == "fp16" and device.kind == "cpu":
        raise ConfigError(f"fp16 cannot train on a CPU; {instead}bf16 or fp32")
    if wanted != "fp32" and stage == 0:
        raise ConfigError(
            f"{wanted} at ZeRO stage 0 trains wrongly in DeepSpeed; use ds_configs/zero1.json, or {instead}fp32"
        )
    if wanted == "bf16" and device.kind == "cuda" and not device.has_bf16:
        raise ConfigError(f"this GPU has no bf16; {instead}fp16 or fp32")
    return wanted


def _optimizer_problems(block: Any, optim: OptimConfig) -> Iterator[str]:
    """The optimizer is ours (per-group learning rates); the JSON may describe it but not another one."""
    if block == AUTO:
        return
    kind = block.get("type", AUTO)
    if kind not in (AUTO, "AdamW"):
        yield f"optimizer.type: found {kind!r}; only AdamW is supported, remove the optimizer block"
    owned = {
        "lr": optim.learning_rate,
        "betas": list(optim.betas),
        "eps": optim.eps,
        "weight_decay": optim.weight_decay,
        "torch_adam": True,
    }
    for key, value in block.get("params", {}).items():
        if key not in owned:
            yield f"unknown optimizer.params.{key}; known: {', '.join(owned)}"
        elif value not in (AUTO, owned[key]):
            option = {"lr": "learning_rate"}.get(key, key)
            yield (f'optimizer.params.{key} is {value} but optim.{option} is {owned[key]}; write "auto" in the JSON')
