"""Bytes of a rank against sums over real modules, and what each ZeRO stage divides."""

from __future__ import annotations

import pytest

from pipeline.config.command_line import DS_CONFIGS
from pipeline.config.options import Config
from pipeline.deepspeed_json.ds_config import Device, read_ds_config, resolve
from pipeline.planning.activations import Activations
from pipeline.planning.counts import Parameters, count_parameters
from pipeline.planning.memory import CHECKPOINT_COPY, CPU, CUDA, HEAP_BLOCK, Memory, Platform, Zero, memory_of, zero_of
from tests.tiny_flm import tiny_flm

NOTHING = Activations(0, 0, 0, 0, 0, 0, 0)
SOME = Activations(
    kept=500, peak=1000, peak_with_gradients=1200, small_peak=600, large_peak=400, operations=1, traffic=1
)
BARE = Platform("cuda", base=0, fragmentation=0.0)
ONE_GROUP = Parameters(groups=((600, 400),), frozen_sizes=(50,))


def memory(stage: int, ranks: int = 4, accumulation: int = 1, weight_bytes: int = 2, **zero) -> Memory:
    settings = Zero(stage, weight_bytes if stage else 4, reduce_bucket=100, overlap=stage > 0, **zero)
    return memory_of(ONE_GROUP, SOME, settings, ranks, accumulation, BARE)


def test_parameters_are_counted_by_group_and_frozen_apart() -> None:
    objective = tiny_flm()
    objective.net.vision.requires_grad_(False)
    found = count_parameters(objective)
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    assert found.trained == trained
    assert found.trained + found.frozen == sum(p.numel() for p in objective.parameters())
    head = sum(
        p.numel() for n, p in objective.named_parameters() if n.startswith(("lm_head", "itm_head")) and p.ndim > 1
    )
    assert head in map(sum, found.groups)
    assert found.largest == max(p.numel() for p in objective.parameters() if p.requires_grad)


def test_a_tensor_that_is_shared_counts_once() -> None:
    objective = tiny_flm()
    before = count_parameters(objective).trained
    objective.lm_head.weight = objective.net.embedding.word.weight
    assert count_parameters(objective).trained == before - objective.net.embedding.word.weight.numel()


@pytest.mark.parametrize(
    ("stage", "held"),
    [
        (0, 4 * 1000 + 4 * 50 + 8 * 1000),  # weights, frozen weights, moments
        (1, 2 * 1000 + 2 * 50 + 12 * 250),  # and masters; the optimizer's divided by 4 ranks
        (2, 2 * 1000 + 2 * 50 + 12 * 250),
        (3, 2 * 250 + 2 * 13 + 12 * 250 + 4 * 250 + 2 * 100),  # all divided; gradients and one bucket for good
    ],
)
def test_what_is_held_all_the_time(stage: int, held: int) -> None:
    assert sum(memory(stage).held.values()) == held


@pytest.mark.parametrize(
    ("stage", "accumulation", "backward"),
    [
        (0, 1, 1200),  # activations with the gradients as they come
        (0, 2, 1000 + 4 * 1000),
        (1, 1, 1000 + 4 * 2 * 100),  # two buckets of fp32 sums
        (1, 2, 1000 + 4 * 2 * 100 + 4 * 1000),  # undivided sums of the micro-batches before
        (2, 1, 1000 + 2 * 2 * 100 + 4 * 250),
        (3, 1, 1000 + 2 * 1050 + 2 * 600),  # weights gathered, and the largest gradient beside the bucket
    ],
)
def test_what_backward_holds_besides(stage: int, accumulation: int, backward: int) -> None:
    assert sum(memory(stage, accumulation=accumulation).moments["backward"].values()) == backward


def test_more_ranks_never_need_more_of_a_rank() -> None:
    for stage in (1, 2, 3):
        peaks = [memory(stage, ranks).peak for ranks in (2, 4, 8, 64)]
        assert peaks == sorted(peaks, reverse=True) and peaks[0] > peaks[-1]
    assert memory(0, 2).peak == memory(0, 64).peak


def test_frozen_parts_have_weights_alone() -> None:
    trained, frozen = Parameters(((1000, 1000),), ()), Parameters(((1000,),), (1000,))
    for stage in (0, 1, 2, 3):
        zero = Zero(stage, 4, reduce_bucket=1)
        both, one = (sum(memory_of(p, NOTHING, zero, 1, 1, BARE).held.values()) for p in (trained, frozen))
        rest = 8 if stage in (0, 3) else 12  # moments; at stages 1 and 2 a copy of fp32 weights as masters too
        assert both - one == 1000 * (rest + (4 if stage == 3 else 0))


def test_offloading_moves_bytes_to_the_node() -> None:
    here, there = memory(2), memory(2, offload_optimizer=True)
    assert sum(here.held.values()) - sum(there.held.values()) == 12 * 250
    assert there.host["masters"] + there.host["moments"] == 12 * 250
    assert sum(memory(3, offload_optimizer=True, offload_weights=True).held.values()) == 2 * 100


def test_a_process_keeps_its_small_blocks_and_saves_in_its_own_memory() -> None:
    zero = Zero(2, 4, reduce_bucket=10**6)
    found = memory_of(ONE_GROUP, SOME, zero, 2, 1, CPU, batches=7)
    assert found.held["small blocks"] == 12 * 500 + SOME.small_peak  # the copy of a checkpoint, during the next step
    assert found.moments["backward"]["activations"] == SOME.large_peak
    waiting = memory_of(ONE_GROUP, SOME, zero, 2, 1, CPU, async_save=False)
    assert waiting.held["small blocks"] == 12 * 500 and sum(waiting.moments["saving"].values()) == 0
    assert not found.host
    most = 4 * (1000 + 1000 + 500)  # a bucket, its sum, this rank's part
    assert found.moment == "reduce" and sum(found.moments["reduce"].values()) == most
    assert found.peak == CPU.base + sum(found.held.values()) + most


def test_large_parameters_leave_a_process_no_small_blocks() -> None:
    large = Parameters(groups=((HEAP_BLOCK, HEAP_BLOCK),), frozen_sizes=())
    found = memory_of(large, NOTHING, Zero(0), 1, 1, CPU)
    assert found.held["small blocks"] == 0
    assert found.moments["backward"][CHECKPOINT_COPY] == 12 * 2 * HEAP_BLOCK


def test_the_allocator_loses_a_share_of_all_but_the_base() -> None:
    found = memory_of(ONE_GROUP, SOME, Zero(1, 2), 4, 1, CUDA)
    tensors = sum(found.held.values()) + sum(found.moments[found.moment].values())
    assert found.peak == CUDA.base + round(1.05 * tensors)


@pytest.mark.parametrize("path", sorted(DS_CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_every_deepspeed_json_can_be_planned(path) -> None:
    config = Config()
    given = read_ds_config(path)
    if "fp16" in path.stem:
        config.train.precision = "fp16"
    zero = zero_of(resolve(given, config, 4, Device("cuda", has_bf16=True)))
    assert str(zero.stage) in path.stem
    assert zero.weight_bytes == (4 if "fp32" in path.stem or zero.stage == 0 else 2)
    assert zero.offload_optimizer == ("offload" in path.stem)
    assert zero.reduce_bucket == given["zero_optimization"].get("reduce_bucket_size", 500_000_000)
