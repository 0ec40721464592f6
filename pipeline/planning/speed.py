"""Seconds of a step, and what a run asks of its network, loaders and disk, by a simple model with stated constants.

What a step demands is counted; a machine's constants turn demands into seconds. Products and memory traffic of a GPU
follow one another, what its host does (launches, and DeepSpeed's hooks at ZeRO 3) runs beside both, and sums over the
ranks run beside the last backward pass as far as they are overlapped. On a CPU nothing runs beside anything, and
activations are in its caches.
Legend: P trained parameters, N ranks, M nodes, G ranks of a node, b bytes of a weight.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.planning.activations import DeviceKind
from pipeline.planning.counts import Parameters, Work
from pipeline.planning.memory import FP32, Zero

ADAM_BYTES = 28  # of an element: weight, gradient and two moments are read, weight and moments written, in fp32
CHECKPOINT_BYTES = 12  # of a trained parameter: weight and two moments in fp32


@dataclass(frozen=True)
class Machine:
    """Constants of one device, its node and the network; what is reached, not what a datasheet promises.

    The defaults are a DGX H100: NVIDIA's datasheets "H100 Tensor Core GPU" (989.5e12 FLOP/s in bf16, 3.35e12 bytes/s of
    memory, NVLink 450e9 bytes/s each way) and "DGX H100" (a network card of 400 Gbit/s for each GPU), times the share
    that is usually reached. The shares, the time of a launch and that of a message are assumptions that nothing here
    has measured; images per core are measured (docs/log.md, "Is loading the limit?"), and so are the hooks, on a core
    of an AMD EPYC (benchmarks/cost/planner.py).
    """

    kind: DeviceKind = "cuda"
    flops: float = 0.45 * 989.5e12  # per second, in matrix products of half precision
    fp32_flops: float = 0.45 * 67e12
    memory_bandwidth: float = 0.8 * 3.35e12  # bytes per second
    operation_seconds: float = 8e-6  # of the host, for an operation's launch
    hook_seconds: float = 0.6e-3  # of the host, for a module's forward and backward pass at ZeRO 3
    node_bandwidth: float = 0.8 * 450e9  # bytes per second of a rank to its node, each way
    network_bandwidth: float = 0.8 * 50e9  # bytes per second of a rank to other nodes, each way
    gathering: float = 1.0  # time of bytes gathered or scattered, in that of half a sum, which moves as many
    message_seconds: float = 20e-6  # of one hop of a collective
    ranks_per_node: int = 8
    step_seconds: float = 0.002  # what a step costs besides: agreement of the ranks, the guard's wait
    cores_per_rank: int = 12
    images_per_core: float = 600.0  # per second: JPEGs of 500 px to 288 px
    image_bytes: float = 42 * 1024
    disk_bandwidth: float = 5e9  # bytes per second that a shared file system writes for all ranks together
    copy_bandwidth: float = 20e9  # bytes per second between a device and its host
    host_bandwidth: float = 40e9  # bytes per second of a rank's share of its node's memory


@dataclass(frozen=True)
class Demands:
    """What one step asks of one rank.

    ``reduced`` bytes are summed over all ranks, ``gathered`` bytes come together on every rank or are scattered;
    what is offloaded causes ``host_traffic`` in the node's memory, and bytes that are ``copied`` to and from it;
    ``last_backward`` is the share of the products that runs after the first gradients may be summed. ``hooked`` modules
    are those whose passes DeepSpeed accompanies, counted in each micro-batch; frozen ones count as the others, though
    most of them have no backward pass.
    """

    flops: float
    traffic: float
    operations: int
    hooked: int
    optimizer_traffic: float
    host_traffic: float
    copied: float
    reduced: float
    gathered: float
    collectives: int
    last_backward: float


@dataclass(frozen=True)
class Speed:
    """Seconds of a step by part, and what follows from them."""

    compute: float
    communication: float  # that nothing hides
    optimizer: float
    other: float
    model_flops: float  # per second and rank, recomputation not counted
    samples_per_second: float  # of all ranks
    cores_needed: float  # of a rank, for loading
    read_bandwidth: float  # bytes per second that all ranks read
    network_bytes: float  # that a rank sends in a step

    @property
    def step_seconds(self) -> float:
        return self.compute + self.communication + self.optimizer + self.other

    @property
    def efficiency(self) -> float:
        """Of weak scaling: a step without communication over a step with it."""
        return 1 - self.communication / self.step_seconds


def demands_of(
    parameters: Parameters, work: Work, zero: Zero, ranks: int, accumulation: int, kind: DeviceKind = "cuda"
) -> Demands:
    """What a step of ``accumulation`` micro-batches asks of one rank, a device of this ``kind``."""
    whole = zero.weight_bytes * parameters.trained
    everything = zero.weight_bytes * (parameters.trained + parameters.frozen)
    part = parameters.trained / ranks
    sums = 1 if zero.stage < 2 else accumulation  # stage 2 and 3 sum every micro-batch
    reduced = gathered = 0.0
    if ranks > 1:
        reduced = float(whole * sums if zero.stage < 3 else 0)  # whole buckets, at stage 2 too
        gathered = float({0: 0, 1: whole, 2: whole, 3: (whole + everything) * accumulation}[zero.stage])
    moved = 2 * sums * _copies(zero.stage, ranks, kind) * whole
    moved += 3 * (accumulation - 1) * (whole if zero.stage < 2 else whole / ranks)  # added to the sum of those before
    if zero.stage == 3 and ranks > 1:  # a rank's part of the weights into a buffer, each weight out of it
        moved += 2 * accumulation * (1 + 1 / ranks) * everything
    own = part if zero.stage else parameters.trained
    moved += (2 * (2 if zero.stage else 1) + 3) * FP32 * own  # flat and back; read for the norm, scaled by it
    adam = ADAM_BYTES * own
    offloaded = (zero.weight_bytes + FP32) * part if zero.offload_optimizer else 0.0  # weights up, gradients down
    if zero.offload_weights:  # a rank's part goes up for each forward and backward pass
        offloaded += 2 * accumulation * everything / ranks
    buckets = max(1, round(parameters.trained / zero.reduce_bucket))
    return Demands(
        flops=accumulation * (work.flops + work.recomputed_flops),
        traffic=float(accumulation * work.activations.traffic),
        operations=accumulation * work.activations.operations,
        hooked=accumulation * parameters.modules if zero.stage == 3 else 0,
        optimizer_traffic=moved + (0.0 if zero.offload_optimizer else adam),
        host_traffic=adam if zero.offload_optimizer else 0.0,
        copied=offloaded,
        reduced=reduced,
        gathered=gathered,
        collectives=(len(parameters.groups) + buckets) * sums if ranks > 1 else 0,
        last_backward=2 / 3 / accumulation if zero.overlap and zero.stage else 0.0,
    )


def speed_of(demands: Demands, machine: Machine, work: Work, ranks: int, accumulation: int) -> Speed:
    """Seconds of a step on ``machine``."""
    compute, hidden = demands.flops / machine.flops, 0.0
    host = demands.operations * machine.operation_seconds + demands.hooked * machine.hook_seconds
    reducing = _all_reduce(demands.reduced, machine, ranks)
    if machine.kind == "cuda":
        compute = max(compute + demands.traffic / machine.memory_bandwidth, host)
        hidden = min(reducing, compute * demands.last_backward)
    else:
        compute += host
    communication = reducing - hidden + machine.gathering * _all_reduce(demands.gathered, machine, ranks) / 2
    communication += demands.collectives * machine.message_seconds * _hops(machine, ranks)
    optimizer = demands.optimizer_traffic / machine.memory_bandwidth
    optimizer += demands.host_traffic / machine.host_bandwidth + demands.copied / machine.copy_bandwidth
    seconds = compute + communication + optimizer + machine.step_seconds
    samples = work.samples * accumulation
    return Speed(
        compute=compute,
        communication=communication,
        optimizer=optimizer,
        other=machine.step_seconds,
        model_flops=accumulation * work.flops / seconds,
        samples_per_second=samples * ranks / seconds,
        cores_needed=samples / seconds / machine.images_per_core,
        read_bandwidth=samples * ranks / seconds * machine.image_bytes,
        network_bytes=(2 * demands.reduced + demands.gathered) * (ranks - 1) / ranks,
    )


def _copies(stage: int, ranks: int, kind: DeviceKind) -> float:
    """How often a gradient is read and written on its way from backward to the rank that it belongs to.

    As counted in DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py, stage3.py, comm/coalesced_collectives.py).
    """
    if stage == 0:
        return 3.0 if ranks > 1 else 1.0  # into a bucket; to a flat copy and back
    if stage < 3:  # into a bucket; divided; to a flat copy and back; a rank's part out of it
        return (4.0 if ranks > 1 else 2.0) + 1 / ranks
    copies = 3 + 1 / ranks  # into a bucket; to a copy in the order of the ranks; divided; a rank's part out of it
    return copies if kind == "cuda" else copies + 1 + 1 / ranks  # gloo scatters by summing a copy of all


def checkpoint_of(parameters: Parameters, machine: Machine, ranks: int) -> tuple[int, float, float]:
    """Bytes of a checkpoint, seconds until it is on disk, and seconds for which training waits (for the copy)."""
    num_bytes = CHECKPOINT_BYTES * parameters.trained
    return num_bytes, num_bytes / machine.disk_bandwidth, num_bytes / ranks / machine.copy_bandwidth


def _all_reduce(num_bytes: float, machine: Machine, ranks: int) -> float:
    """Seconds of a sum over all ranks: scattered within a node, summed between nodes part by part, gathered again.

    A ring moves 2(N-1)/N of the bytes over every link (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce").
    """
    within = min(ranks, machine.ranks_per_node)
    nodes = -(-ranks // machine.ranks_per_node)
    inside = 2 * (within - 1) / within * num_bytes / machine.node_bandwidth
    return inside + 2 * (nodes - 1) / nodes * num_bytes / within / machine.network_bandwidth


def _hops(machine: Machine, ranks: int) -> int:
    """Messages that follow one another in a collective: a tree over the nodes, a ring within one."""
    nodes = -(-ranks // machine.ranks_per_node)
    return min(ranks, machine.ranks_per_node) - 1 + 2 * (nodes - 1).bit_length()
