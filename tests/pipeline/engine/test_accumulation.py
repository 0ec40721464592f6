"""Gradients of many micro-batches in bf16 are summed in fp32 at every ZeRO stage, as a sum in double shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config.options import Config, GuardConfig
from pipeline.deepspeed_json.ds_config import Device, read_ds_config, resolve
from pipeline.distributed.places import Place
from pipeline.incidents.guard import Guard
from tests.forked_ranks import run_ranks
from tests.pipeline.engine import test_engine
from tests.pipeline.engine.test_engine import make_engine, micro_batches, tiny_config
from tests.tiny_objective import TinyObjective

NUM_MICRO = 64
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}  # largest relative error of one rounding


def plain_linear_layers(path: Path) -> dict[str, Any]:
    """A DeepSpeed JSON, at stage 3 with torch's linear layers instead of DeepSpeed's, which round in another way."""
    given = read_ds_config(path)
    if given["zero_optimization"]["stage"] == 3:
        given["zero_optimization"]["memory_efficient_linear"] = False
    return given


def gradients_of_a_step(place, config: Config, stage: int | str) -> dict[str, Tensor]:
    """The gradient of a whole step as the optimizer is about to take it."""
    test_engine.read_ds_config = plain_linear_layers
    engine, _ = make_engine(place, config, stage)
    found = {}

    def note() -> tuple[float, ...]:
        found.update({name: gradient.clone().numpy() for name, gradient, _ in engine._whole_gradients()})
        return ()

    engine.step(0, micro_batches(config, place, 0), Guard(GuardConfig()), note)
    return found


def micro_gradients(config: Config, world_size: int) -> dict[str, list[Tensor]]:
    """The gradient of each micro-batch in the same precision by plain torch, the mean over ranks, added in bf16."""
    torch.manual_seed(3)
    model = TinyObjective().bfloat16()
    ranks = [micro_batches(config, Place(rank, world_size, rank, "single"), 0) for rank in range(world_size)]
    counts = {name: sum(batch.counts.get(name, 0) for rank in ranks for batch in rank) for name in model.term_weights}
    number = len(ranks[0])
    weights = {name: model.term_weights[name] * world_size * number / max(count, 1) for name, count in counts.items()}
    found = {name: [torch.zeros_like(value) for _ in range(number)] for name, value in model.named_parameters()}
    for rank in ranks:
        for index, batch in enumerate(rank):
            model.zero_grad()
            (sum(weights[name] * value for name, value in model(batch).items()) / number).backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    found[name][index] += parameter.grad / world_size
    return found


def compare(place, config: Config, stages: tuple[int | str, ...]) -> dict[int | str, tuple[float, float]]:
    """By stage: the largest error of the sum over its bound, and the same of a sum in bf16."""
    micro = micro_gradients(config, place.world_size)
    worst = {}
    for stage in stages:
        found = gradients_of_a_step(place, config, stage)
        errors, in_bf16 = [], []
        for name, parts in micro.items():
            exact = sum(part.double() for part in parts)
            size = sum(part.double().abs() for part in parts)
            bound = (len(parts) - 1) * UNIT[torch.float32] * size
            if stage == 1 and place.world_size == 1:  # sums of a rank are rounded to bf16 once, to be sent
                bound = bound + UNIT[torch.bfloat16] * exact.abs()
            elif stage == 1:  # and so is their mean; what they are of is not rounded, but in ``micro`` it is
                bound = bound + 3 * UNIT[torch.bfloat16] * size
            low = parts[0].clone()
            for part in parts[1:]:
                low += part
            bound = bound + 1e-30  # of a gradient that is zero throughout
            errors.append(float(((torch.from_numpy(found[name]).double() - exact).abs() / bound).max()))
            in_bf16.append(float(((low.double() - exact).abs() / bound).max()))
        worst[stage] = (max(errors), max(in_bf16))
    return worst


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "stages"), [(1, (1, 2, 3, "2_offload", "3_offload")), (2, (1, 2, 3))])
def test_64_micro_batches_are_summed_in_fp32(world_size: int, stages: tuple[int | str, ...]) -> None:
    config = tiny_config(batch_size=2 * NUM_MICRO * world_size, micro=2, precision="bf16")
    for found in run_ranks(world_size, compare, config, stages):
        for stage, (error, in_bf16) in found.items():
            assert error <= 1, (stage, error)
            assert in_bf16 > 3 or (stage, world_size) == (1, 2), (stage, in_bf16)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_json_may_say_otherwise(precision: str) -> None:
    config = tiny_config(precision=precision)
    given = {"zero_optimization": {"stage": 2}}
    gpu = Device(kind="cuda", has_bf16=True)
    assert resolve(given, config, 2, gpu).get("data_types", {}) == (
        {} if precision == "fp32" else {"grad_accum_dtype": "fp32"}
    )
    given["data_types"] = {"grad_accum_dtype": "bf16"}
    assert resolve(given, config, 2, gpu)["data_types"] == {"grad_accum_dtype": "bf16"}
