"""Seconds of a step by hand, and what more GPUs change."""

from __future__ import annotations

import dataclasses

import pytest

from pipeline.planning.activations import Activations
from pipeline.planning.counts import Parameters, Work
from pipeline.planning.memory import Zero
from pipeline.planning.speed import Machine, checkpoint_of, demands_of, speed_of

PARAMETERS = Parameters(groups=((10**9,),), frozen_sizes=())
WORK = Work(64, 800, 6e12, 0.0, 0, Activations(0, 0, 0, 0, 0, operations=1000, traffic=2 * 10**10))
PLAIN = Machine(
    flops=3e14,
    memory_bandwidth=2e12,
    node_bandwidth=1e11,
    network_bandwidth=1e10,
    message_seconds=0.0,
    step_seconds=0.0,
    ranks_per_node=8,
)


def speed(ranks: int, stage: int = 1, accumulation: int = 1, machine: Machine = PLAIN, overlap: bool = False):
    zero = Zero(stage, 2, overlap=overlap)
    demands = demands_of(PARAMETERS, WORK, zero, ranks, accumulation)
    return speed_of(demands, machine, WORK, ranks, accumulation)


def test_one_gpu_sends_nothing() -> None:
    found = speed(1)
    assert found.communication == found.network_bytes == 0
    assert found.compute == pytest.approx(6e12 / 3e14 + 2e10 / 2e12)
    assert found.efficiency == 1


def test_a_host_that_launches_slowly_is_the_limit() -> None:
    slow = dataclasses.replace(PLAIN, operation_seconds=1e-3)
    assert speed(1, machine=slow).compute == pytest.approx(1.0)


def test_at_stage_3_the_host_accompanies_every_module_of_every_micro_batch() -> None:
    hooked = dataclasses.replace(PARAMETERS, modules=200)

    def compute(stage: int, accumulation: int, machine: Machine = PLAIN, kind: str = "cuda") -> float:
        demands = demands_of(hooked, WORK, Zero(stage, 2), 1, accumulation, kind)
        return speed_of(demands, dataclasses.replace(machine, kind=kind), WORK, 1, accumulation).compute

    slow = dataclasses.replace(PLAIN, hook_seconds=1e-2)
    assert compute(3, 4, slow) == pytest.approx(4 * (1000 * PLAIN.operation_seconds + 200 * 1e-2))
    assert compute(2, 4, slow) == compute(2, 4)
    quick = dataclasses.replace(PLAIN, operation_seconds=0.0, hook_seconds=0.0)
    assert compute(3, 4, slow, "cpu") - compute(3, 4, quick, "cpu") == pytest.approx(compute(3, 4, slow))  # in turn


def test_a_sum_over_a_node_and_over_nodes() -> None:
    """Stage 1: gradients summed, 2 (N-1)/N of their bytes a link; weights gathered, half of that."""
    in_node = 2 * 7 / 8 * 2e9 / 1e11
    assert speed(8).communication == pytest.approx(1.5 * in_node)
    between = 2 * 1 / 2 * 2e9 / 8 / 1e10  # each GPU of a node has an eighth to sum with the other node
    assert speed(16).communication == pytest.approx(1.5 * (in_node + between))


def test_stages_2_and_3_sum_every_micro_batch() -> None:
    one, four = (speed(8, stage=2, accumulation=k) for k in (1, 4))
    assert four.network_bytes == pytest.approx((4 * 2 + 1) / 3 * one.network_bytes)
    assert speed(8, stage=3, accumulation=4).network_bytes == pytest.approx(4 * speed(8, stage=3).network_bytes)
    assert speed(8, stage=1, accumulation=4).network_bytes == speed(8, stage=1).network_bytes


def test_sums_hide_behind_the_last_backward_pass_at_most() -> None:
    hidden = speed(8).communication - speed(8, overlap=True).communication
    assert 0 < hidden <= 2 / 3 * speed(8).compute


def test_efficiency_falls_with_nodes_and_rises_with_the_batch() -> None:
    falling = [speed(ranks).efficiency for ranks in (8, 64, 512)]
    assert falling == sorted(falling, reverse=True)
    assert speed(512, accumulation=8).efficiency > speed(512).efficiency


@pytest.mark.parametrize(
    ("stage", "ranks", "kind", "bytes_of_a_parameter"),
    [
        (0, 1, "cpu", 2 * 4 + 2 * 4 + 3 * 4 + 28),  # into a bucket; back; norm and scaling; Adam
        (1, 1, "cpu", 2 * 3 * 4 + 4 * 4 + 3 * 4 + 28),  # into a bucket, divided, out of it; flat and back
        (2, 4, "cuda", 2 * 4.25 * 2 + (4 * 4 + 3 * 4 + 28) / 4),
        (3, 1, "cpu", 2 * (4 + 2) * 4 + 4 * 4 + 3 * 4 + 28),  # gloo: one copy and its part more
        (3, 4, "cuda", 2 * 3.25 * 2 + 2 * 1.25 * 2 + (4 * 4 + 3 * 4 + 28) / 4),
    ],
)
def test_what_a_step_moves_in_memory_for_its_optimizer(stage: int, ranks: int, kind, bytes_of_a_parameter) -> None:
    demands = demands_of(PARAMETERS, WORK, Zero(stage, 4 if kind == "cpu" else 2), ranks, 1, kind)
    assert demands.optimizer_traffic == pytest.approx(bytes_of_a_parameter * 10**9)


def test_gradients_of_further_micro_batches_are_added() -> None:
    def moved(stage: int, accumulation: int) -> float:
        return demands_of(PARAMETERS, WORK, Zero(stage, 4), 4, accumulation, "cpu").optimizer_traffic / 10**9

    assert moved(1, 3) - moved(1, 1) == pytest.approx(2 * 3 * 4)  # read, read, written
    assert moved(2, 3) - moved(2, 1) == pytest.approx(
        2 * (3 * 4 / 4 + 2 * 4.25 * 4)
    )  # a rank's part; reduced each time


def test_gathering_may_be_slower_than_summing() -> None:
    slow = dataclasses.replace(PLAIN, gathering=10.0)
    one, ten = (speed(8, machine=machine).communication for machine in (PLAIN, slow))
    assert ten == pytest.approx(one + 9 * one / 3)  # stage 1: weights gathered are half of what the sum moves


def test_offloading_costs_time() -> None:
    def seconds(**offload: bool) -> float:
        demands = demands_of(PARAMETERS, WORK, Zero(2, 2, **offload), 8, 1)
        return speed_of(demands, PLAIN, WORK, 8, 1).step_seconds

    assert seconds(offload_optimizer=True) > seconds()


def test_a_checkpoint_is_twelve_bytes_a_parameter() -> None:
    machine = dataclasses.replace(PLAIN, disk_bandwidth=1e9, copy_bandwidth=1e10)
    assert checkpoint_of(PARAMETERS, machine, 4) == (12 * 10**9, 12.0, pytest.approx(0.3))
