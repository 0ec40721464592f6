"""DeepSpeed's JSON as people have it: accepted, or refused in one line that names every key (invariant 9)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.options import Config, ConfigError, OptimConfig
from pipeline.deepspeed_json.ds_config import Device, read_ds_config, resolve
from pipeline.deepspeed_json.ds_schema import KEYS

CPU, GPU = Device("cpu", has_bf16=True), Device("cuda", has_bf16=True)
CONFIG = Config(optim=OptimConfig(batch_size=8, micro_batch_size=4))

# The examples of transformers' documentation ("DeepSpeed", "ZeRO-1", "ZeRO-2", "ZeRO-3") and of its tests.
HF_ZERO_1 = {"zero_optimization": {"stage": 1}}
HF_ZERO_2 = {
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "allgather_partitions": True,
        "allgather_bucket_size": 5e8,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 5e8,
        "contiguous_gradients": True,
        "round_robin_gradients": True,
    }
}
HF_ZERO_3 = {
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
HF_SCHEDULER = {
    "type": "WarmupLR",
    "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
}


def resolved_and_read(given: dict[str, Any], device: Device = CPU) -> dict[str, Any]:
    """What set-up does before any rank is connected."""
    from pipeline.engine.ds_check import check_ds_config

    resolved = resolve(given, CONFIG, 1, device)
    check_ds_config(resolved)
    return resolved


def refusal(given: dict[str, Any], device: Device = CPU) -> str:
    with pytest.raises(ConfigError) as refused:
        resolved_and_read(given, device)
    message = str(refused.value)
    assert message.startswith("--deepspeed: ") and "\n" not in message
    return message


@pytest.mark.parametrize("given", [HF_ZERO_1, HF_ZERO_2, HF_ZERO_3], ids=["zero1", "zero2", "zero3"])
@pytest.mark.parametrize("device", [CPU, GPU], ids=["cpu", "gpu"])
def test_the_examples_of_transformers_are_taken(given: dict[str, Any], device: Device) -> None:
    resolved = resolved_and_read(given, device)
    assert "auto" not in json.dumps(resolved)
    assert resolved["bf16"]["enabled"] is (device is GPU)
    for key, value in given["zero_optimization"].items():
        assert resolved["zero_optimization"].get(key, "auto") == value, "what is auto is DeepSpeed's default"


def test_all_reasons_at_once() -> None:
    wrong = HF_ZERO_3 | {"scheduler": HF_SCHEDULER, "gradient_clipping": 1.0, "train_batch_size": 16, "amp": {}}
    message = refusal(wrong | {"steps_per_print": "auto"})
    for part in (
        "5 things to mend: ",
        "scheduler: not supported; remove it and use optim.schedule",
        "gradient_clipping is 1.0 but optim.clip_grad_norm gives 0",
        "train_batch_size is 16 but optim.batch_size gives 8",
        "amp: not supported; remove it and choose by --train.precision",
        "the recipe does not own steps_per_print",
    ):
        assert part in message
    message = refusal({"bf16": True, "optimizer": "AdamW", "zero_optimization": {"stage": "2"}})
    assert message.count("expected") == 3


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"bf16": True}, 'bf16: found true, expected an object like {"enabled": true}'),
        ({"bf16": {"enabled": "true"}}, 'bf16.enabled: found "true", expected true or false'),
        ({"zero_optimization": True}, 'zero_optimization: found true, expected an object like {"stage": 2}'),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage: found true, expected a whole number"),
        ({"optimizer": "AdamW"}, 'optimizer: found "AdamW", expected an object like {"type": "AdamW"}'),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, 'write "offload_optimizer": {"device": "cpu"}'),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}, 'an object like {"device": "cpu"}'),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "zero_optimization.zenflow: not supp"),
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "zero_optimization.overlap_com: DeepSpeed has no"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}}, "reduce_bucket_size: found -1, DeepSpeed says"),
        ({"zero_optimization": {"mics_shard_size": 2}}, "zero_optimization: DeepSpeed refuses it (MiCS"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel: no such key, or one that is not supported"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast: not supported; remove it and choose by --train.prec"),
        ({"zero_optimisation": {"stage": 2}}, "zero_optimisation: no such key, or one that is not supported; did you"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op: no such key"),
        ({"data_types": {"grad_accum_dtype": 32}}, "data_types.grad_accum_dtype: found 32, expected one of fp32"),
        ({"communication_data_type": "fp8"}, "communication_data_type: DeepSpeed refuses it"),
    ],
)
def test_what_is_refused_names_the_key(given: dict[str, Any], expected: str) -> None:
    assert expected in refusal(given)


@pytest.mark.parametrize("name", ["offload_optimizer", "offload_param"])
def test_null_is_deepspeeds_default(name: str) -> None:
    given = {"zero_optimization": {"stage": 2, name: None}, "gradient_clipping": None, "optimizer": None, "bf16": None}
    resolved = resolved_and_read(given)
    assert name not in resolved["zero_optimization"] and resolved["gradient_clipping"] == 0
    assert resolved == resolved_and_read({"zero_optimization": {"stage": 2}})


def places(keys: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = [(*path, name) for name in keys]
    for name, kind in keys.items():
        found += places(kind, (*path, name)) if isinstance(kind, dict) else []
    return found


@pytest.mark.parametrize("path", [*places(KEYS), ("unknown",), ("zero_optimization", "unknown")], ids=".".join)
def test_a_value_of_any_type_anywhere_is_taken_or_refused_in_one_line(path: tuple[str, ...]) -> None:
    """Of JSON's types at most two fit a key: a number or null, a flag or null, an object or null."""
    taken = 0
    for value in (True, False, 3, -1, 2.5, 1e400, float("nan"), "", "x", [], ["x"], [{}], {}, {"x": 1}):
        given: Any = value
        for name in reversed(path):
            given = {name: given}
        try:
            resolved = resolved_and_read({"zero_optimization": {"stage": 2}} | given)
            json.dumps(resolved)
            taken += 1
        except ConfigError as error:
            assert any(name in str(error) for name in path) and "\n" not in str(error), (value, str(error))
    assert taken < 7


def test_files_that_are_no_json_object(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    for content in (b"", b"{", b"[1]", b"\xff{}", b'{"a": 1, "a": 2}', b"[" * 100_000, b"3", b'{"a": ' + b"9" * 9999):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="--deepspeed .*ds.json: ") as refused:
            read_ds_config(path)
        assert "\n" not in str(refused.value)
    path.write_bytes(b'\xef\xbb\xbf{"bf16": {"enabled": true}}')
    assert read_ds_config(path) == {"bf16": {"enabled": True}}
