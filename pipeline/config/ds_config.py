"""DeepSpeed's JSON: fills in every "auto" from the recipe and refuses what contradicts it."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.options import Config, ConfigError, accumulation_steps, leaves

AUTO = "auto"


@dataclass(frozen=True)
class Device:
    """What the resolver must know of the hardware: ``kind`` cuda or cpu, and whether it computes in bf16."""

    kind: str
    has_bf16: bool


def read_ds_config(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
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
    """The JSON DeepSpeed gets: no "auto" left, ``gradient_clipping`` written (DeepSpeed clips at 1.0 without it)."""
    resolved = copy.deepcopy(given)
    optim = config.optim
    stage = zero_stage(given)
    precision = choose_precision(given, config.train.precision, stage, device)
    _own(resolved, "train_batch_size", optim.batch_size, "optim.batch_size")
    _own(resolved, "train_micro_batch_size_per_gpu", optim.micro_batch_size, "optim.micro_batch_size")
    accumulation = accumulation_steps(optim, world_size)
    fix = "optim.batch_size, optim.micro_batch_size and the number of ranks"
    _own(resolved, "gradient_accumulation_steps", accumulation, fix)
    _own(resolved, "gradient_clipping", optim.clip_grad_norm, "optim.clip_grad_norm")
    for name in ("bf16", "fp16"):
        section = resolved.setdefault(name, {})
        section["enabled"] = precision == name
    if precision != "fp16":
        resolved["fp16"] = {"enabled": False}
    _resolve_optimizer(resolved, config)
    if resolved.pop("scheduler", AUTO) != AUTO:
        raise ConfigError("--deepspeed: the JSON has a scheduler; remove it and use optim.schedule of the recipe")
    zero = resolved.setdefault("zero_optimization", {"stage": 0})
    for kind in ("offload_optimizer", "offload_param"):
        if zero.get(kind, {}).get("device", "none") not in ("none", "cpu"):
            raise ConfigError(f"--deepspeed: {kind} to {zero[kind]['device']} is not supported; use cpu or none")
    if zero.get("offload_optimizer", {}).get("device") == "cpu":
        resolved.setdefault("zero_force_ds_cpu_optimizer", False)  # torch's fused CPU AdamW serves
    resolved.setdefault("steps_per_print", 10**9)  # our own log says more
    left = [key for key, value in leaves(resolved) if value == AUTO]
    if left:
        raise ConfigError(f'--deepspeed: the recipe does not own {", ".join(left)}; write values instead of "auto"')
    return resolved


def zero_stage(given: dict[str, Any]) -> int:
    stage = given.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"--deepspeed: zero_optimization.stage: found {stage!r}, expected 0, 1, 2 or 3")
    return stage


def choose_precision(given: dict[str, Any], wanted: str, stage: int, device: Device) -> str:
    """fp32, bf16 or fp16 from the recipe's ``train.precision`` and the JSON, which must not contradict each other."""
    fixed = {name: given.get(name, {}).get("enabled", AUTO) for name in ("bf16", "fp16")}
    on = [name for name, value in fixed.items() if value is True]
    if len(on) > 1:
        raise ConfigError("--deepspeed: bf16 and fp16 are both enabled; enable one")
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


def _resolve_optimizer(resolved: dict[str, Any], config: Config) -> None:
    """The optimizer is ours (per-group learning rates); the JSON may describe it but not another one."""
    block = resolved.pop("optimizer", None)
    if block in (None, AUTO):
        return
    kind = block.get("type", AUTO)
    if kind not in (AUTO, "AdamW"):
        raise ConfigError(f"--deepspeed: optimizer {kind}; only AdamW is supported, remove the optimizer block")
    optim = config.optim
    owned = {
        "lr": optim.learning_rate,
        "betas": list(optim.betas),
        "eps": optim.eps,
        "weight_decay": optim.weight_decay,
        "torch_adam": True,
    }
    for key, value in block.get("params", {}).items():
        if key not in owned:
            raise ConfigError(f"--deepspeed: unknown optimizer.params.{key}; known: {', '.join(owned)}")
        if value not in (AUTO, owned[key]):
            option = {"lr": "learning_rate"}.get(key, key)
            raise ConfigError(
                f"--deepspeed: optimizer.params.{key} is {value} but optim.{option} is {owned[key]}; write "
                f'"auto" in the JSON'
            )


def _own(resolved: dict[str, Any], key: str, value: Any, option: str) -> None:
    found = resolved.get(key, AUTO)
    if found not in (AUTO, value):
        raise ConfigError(f'--deepspeed: {key} is {found} but {option} gives {value}; write "auto" in the JSON')
    resolved[key] = value
