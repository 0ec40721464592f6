"""Which keys DeepSpeed's JSON may have here, of which types, and what to write instead of the others."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

AUTO = "auto"

# Type of each key, or the texts that it may be. A section that is a mapping lists the keys we read; DeepSpeed checks
# its others (pipeline/engine/ds_check.py). `dict` is a section that DeepSpeed checks as a whole.
_OFFLOAD = {"device": str}
_PRECISION = {"enabled": bool}
_DTYPES = ("fp32", "float32", "fp16", "float16", "bf16", "bfloat16")
_PARAMS = {"lr": float, "betas": list, "eps": float, "weight_decay": float, "torch_adam": bool}
KEYS: dict[str, Any] = {
    "train_batch_size": int,
    "train_micro_batch_size_per_gpu": int,
    "gradient_accumulation_steps": int,
    "gradient_clipping": float,
    "optimizer": {"type": str, "params": _PARAMS},
    "bf16": _PRECISION,
    "fp16": _PRECISION,
    "zero_optimization": {"stage": int, "offload_optimizer": _OFFLOAD, "offload_param": _OFFLOAD},
    "zero_allow_untested_optimizer": bool,
    "zero_force_ds_cpu_optimizer": bool,
    "communication_data_type": str,
    "prescale_gradients": bool,
    "gradient_predivide_factor": float,
    "disable_allgather": bool,
    "steps_per_print": int,
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "dump_state": bool,
    "disable_python_gc": bool,
    "dataloader_drop_last": bool,
    "vocabulary_size": int,
    "log_level": str,
    "data_types": dict.fromkeys(("grad_accum_dtype", "param_dtype", "buffer_dtype"), _DTYPES),
    "activation_checkpointing": {
        **dict.fromkeys(("partition_activations", "cpu_checkpointing", "contiguous_memory_optimization"), bool),
        **dict.fromkeys(("synchronize_checkpoint_boundary", "profile"), bool),
        "number_checkpoints": int,
    },
    "aio": {
        **dict.fromkeys(("block_size", "queue_depth", "intra_op_parallelism", "thread_count"), int),
        **dict.fromkeys(("single_submit", "overlap_events", "use_gds"), bool),
    },
    "flops_profiler": {
        **dict.fromkeys(("enabled", "detailed"), bool),
        **dict.fromkeys(("profile_step", "module_depth", "top_modules"), int),
        "recompute_fwd_factor": float,
        "output_file": str,
    },
    "checkpoint": {
        **dict.fromkeys(("load_universal", "use_node_local_storage"), bool),
        "tag_validation": str,
        "parallel_write": {"pipeline_stage": bool},
    },
    "timers": {"throughput": dict},
    **dict.fromkeys(("comms_logger", "tensorboard", "wandb", "csv_monitor", "comet"), dict),
}
INSTEAD = {
    "scheduler": "remove it and use optim.schedule and optim.warmup_fraction of the recipe",
    "amp": "remove it and choose by --train.precision",
    "torch_autocast": "remove it and choose by --train.precision",
    "bfloat16": "write bf16",
    "compile": "remove it and use --train.compile true",
    "zero_optimization.cpu_offload": 'write "offload_optimizer": {"device": "cpu"}',
    "zero_optimization.cpu_offload_param": 'write "offload_param": {"device": "cpu"}',
    "zero_optimization.cpu_offload_use_pin_memory": 'write "pin_memory" into offload_optimizer or offload_param',
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": 'write "stage3_gather_16bit_weights_on_model_save"',
    "zero_optimization.zenflow": "remove it",
}
_IN_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", list: "a list"}


def without_nulls(tree: Mapping[str, Any]) -> dict[str, Any]:
    """``tree`` without the keys that are null, at any depth: null is DeepSpeed's default, as no key is."""
    return {
        key: without_nulls(value) if isinstance(value, dict) else value
        for key, value in tree.items()
        if value is not None
    }


def type_problems(
    given: Mapping[str, Any], keys: Mapping[str, Any] = KEYS, prefix: str = ""
) -> Iterator[tuple[str, str]]:
    """What is wrong with the types of ``given``: each key with its problem; "auto" is of every type but a section's."""
    for name, kind in keys.items():
        value = given.get(name)
        is_section = kind is dict or isinstance(kind, Mapping)
        if value is None or (value == AUTO and (not is_section or name == "optimizer")):
            continue
        if not is_section and not _is_of(value, kind):
            expected = _IN_WORDS[kind] if isinstance(kind, type) else f"one of {', '.join(kind)}"
            yield f"{prefix}{name}", f"found {_shown(value)}, expected {expected}"
        elif is_section and not isinstance(value, dict):
            example = json.dumps(_example(name))
            yield f"{prefix}{name}", f"found {_shown(value)}, expected an object like {example}"
        elif isinstance(kind, Mapping):
            yield from type_problems(value, kind, f"{prefix}{name}.")


def without(tree: Mapping[str, Any], keys: Iterable[str], prefix: str = "") -> dict[str, Any]:
    """``tree`` without the dotted ``keys``."""
    dropped = set(keys)
    return {
        key: without(value, dropped, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in tree.items()
        if f"{prefix}{key}" not in dropped
    }


def unsupported(given: Mapping[str, Any]) -> Iterator[str]:
    """Keys that DeepSpeed would take, or ignore, and this program can't do; a problem a key."""
    zero = given.get("zero_optimization", {})
    for name in [*(key for key in given if key not in KEYS), *(f"zero_optimization.{key}" for key in zero)]:
        if name == "scheduler" and given[name] == AUTO:
            continue
        if name in INSTEAD:
            yield f"{name}: not supported; {INSTEAD[name]}"
        elif "." not in name:
            close = difflib.get_close_matches(name, KEYS, n=1, cutoff=0.7)
            advice = f"did you mean {close[0]}?" if close else "remove it"
            yield f"{name}: no such key, or one that is not supported; {advice}"


def _is_of(value: Any, kind: type | tuple[str, ...]) -> bool:
    if isinstance(kind, tuple):
        return value in kind
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is int:  # 5e8 is a whole number
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return isinstance(value, (int, float) if kind is float else kind)


def _example(name: str) -> dict[str, Any]:
    return {
        "optimizer": {"type": "AdamW"},
        "params": {"lr": "auto"},
        "zero_optimization": {"stage": 2},
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
        "data_types": {"grad_accum_dtype": "fp32"},
    }.get(name, {"enabled": True})


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
