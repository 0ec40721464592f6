"""Bytes that a rank holds, part by part and moment by moment, as DeepSpeed 0.19.8 and the engine allocate them.

Legend: P trained parameters, F frozen ones, N ranks, b bytes of a working weight (4 in fp32, 2 in bf16 and fp16),
k micro-batches of a step. Masters, moments and sums of gradients are fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.planning.activations import Activations, DeviceKind
from pipeline.planning.counts import Parameters

FP32 = 4
STAGE_0_BUCKET = 500_000_000  # elements that DeepSpeed sums at a time where its optimizer is not a ZeRO one
STREAMED_FILE_BYTES = 1 << 28  # held by a save that writes while training waits
CHECKPOINT_COPY = "copy of a checkpoint that is being written"
SHAPED = ("gradients", "gathered weights", CHECKPOINT_COPY)  # in blocks of the parameters' sizes
HEAP_BLOCK = 32 << 20  # smaller blocks stay in the process once they were used (pipeline/distributed/host_memory.py)


@dataclass(frozen=True)
class Platform:
    """What a device does with memory besides the tensors of training.

    ``base`` bytes are there before the first tensor: of the CUDA context, the libraries and NCCL on a GPU, of the
    interpreter and its libraries in a process. A buffer counts on a CPU as far as it was written to. ``fragmentation``
    is the share of all tensors that the allocator loses.
    """

    kind: DeviceKind
    base: int
    fragmentation: float


# Not measured here: about 0.5 GB of context and kernels and 0.5 to 1 GB of NCCL's channels and cuBLAS' workspace are
# usual on an H100; the caching allocator's loss is the usual allowance.
CUDA = Platform("cuda", base=1_500_000_000, fragmentation=0.05)
# VmHWM of a rank of the smallest model on one machine (495 MB beside other work), by benchmarks/cost/planner.py.
CPU = Platform("cpu", base=480_000_000, fragmentation=0.0)


@dataclass(frozen=True)
class Zero:
    """What of a resolved DeepSpeed JSON decides memory and traffic; sizes in elements."""

    stage: int = 0
    weight_bytes: int = FP32
    reduce_bucket: int = 500_000_000
    overlap: bool = False
    persistence_threshold: int = 100_000
    max_live: int = 1_000_000_000
    offload_optimizer: bool = False
    offload_weights: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by part: what is ``held`` all the time, and what is held besides in each of the ``moments``.

    ``host`` is what a GPU's rank holds in the memory of its node.
    """

    held: Mapping[str, int]
    moments: Mapping[str, Mapping[str, int]]
    host: Mapping[str, int] = field(default_factory=dict)
    platform: Platform = CUDA

    @property
    def moment(self) -> str:
        """The moment at which most is held."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def peak(self) -> int:
        tensors = sum(self.held.values()) + sum(self.moments[self.moment].values())
        return self.platform.base + round(tensors * (1 + self.platform.fragmentation))


def zero_of(resolved: Mapping[str, Any]) -> Zero:
    """The settings of a resolved DeepSpeed JSON; what it leaves out has DeepSpeed's default."""
    zero = resolved["zero_optimization"]
    halves = any(resolved[name]["enabled"] for name in ("bf16", "fp16"))
    return Zero(
        stage=zero["stage"],
        weight_bytes=2 if halves else FP32,
        reduce_bucket=int(zero.get("reduce_bucket_size", Zero.reduce_bucket)),
        overlap=bool(zero.get("overlap_comm", zero["stage"] == 3)),
        persistence_threshold=int(zero.get("stage3_param_persistence_threshold", Zero.persistence_threshold)),
        max_live=int(zero.get("stage3_max_live_parameters", Zero.max_live)),
        offload_optimizer=zero.get("offload_optimizer", {}).get("device") == "cpu",
        offload_weights=zero.get("offload_param", {}).get("device") == "cpu",
    )


def memory_of(
    parameters: Parameters,
    activations: Activations,
    zero: Zero,
    ranks: int,
    accumulation: int,
    platform: Platform = CUDA,
    async_save: bool = True,
    batches: int = 0,
) -> Memory:
    """What the rank that holds most needs; ``batches`` are bytes of images that wait for their turn on a CPU."""
    if zero.stage == 0:
        held, moments = _stage_0(parameters, activations, ranks, accumulation)
    elif zero.stage < 3:
        held, moments = _stage_1_and_2(parameters, activations, zero, ranks, accumulation, platform)
    else:
        held, moments = _stage_3(parameters, activations, zero, ranks, platform)
    copy = -(-3 * FP32 * parameters.trained // ranks)
    host = {CHECKPOINT_COPY: copy if async_save else min(copy, STREAMED_FILE_BYTES)}
    if platform.kind == "cuda":
        return Memory(held, moments, host | _offloaded(parameters, zero, ranks), platform)
    if async_save:  # the copy is still being written when the next step runs
        moments = {name: {**parts, **host} for name, parts in moments.items()}
    else:
        moments = moments | {"saving": host}
    small, moments = _small_blocks(moments, parameters, activations, zero)
    return Memory(held | {"batches": batches, "small blocks": small}, moments, {}, platform)


def _stage_0(
    parameters: Parameters, activations: Activations, ranks: int, accumulation: int
) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """fp32 everywhere, nothing divided; gradients are summed in a flat copy, also with one rank."""
    trained = FP32 * parameters.trained
    held = {"weights": trained, "frozen weights": FP32 * parameters.frozen, "moments": 2 * trained}
    whole = {"gradients": trained}
    backward = {"activations": activations.peak_with_gradients}
    if accumulation > 1:
        backward = {"activations": activations.peak} | whole
    summed = {"gradients being summed": FP32 * min(parameters.trained, STAGE_0_BUCKET)}
    return held, {"backward": backward, "reduce": whole | summed, "step": whole}


def _stage_1_and_2(
    parameters: Parameters,
    activations: Activations,
    zero: Zero,
    ranks: int,
    accumulation: int,
    platform: Platform,
) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """Weights whole and flat; masters and moments divided, at stage 2 gradients too.

    Gradients are copied into a bucket as they come, summed in a flat copy of it, and this rank's part is copied out.
    With fp32 sums of half-precision gradients, stage 1 keeps the sums in fp32, undivided.
    """
    trained, part = parameters.trained, -(-parameters.trained // ranks)
    halves = zero.weight_bytes < FP32
    held = {
        "weights": zero.weight_bytes * trained,
        "frozen weights": zero.weight_bytes * parameters.frozen,
        "masters": FP32 * part,
        "moments": 2 * FP32 * part,
    }
    if zero.offload_optimizer:
        del held["masters"], held["moments"]
    bucket_type = FP32 if zero.stage == 1 else zero.weight_bytes
    filled = min(trained, zero.reduce_bucket)
    buckets = (1 + zero.overlap) * zero.reduce_bucket
    if platform.kind == "cpu":
        buckets = min(trained, buckets)
    bucket = {"buckets": bucket_type * buckets}
    own = {"this rank's gradients": FP32 * part}
    before: dict[str, int] = {}  # of earlier micro-batches
    if accumulation > 1 and zero.stage == 1:
        before = {"gradients": FP32 * trained}
    elif zero.stage == 2 and (halves or accumulation > 1):
        before = {"gradients before": FP32 * part}
    summed = {"gradients being summed": bucket_type * filled} if ranks > 1 else {}
    backward = {"activations": activations.peak} | bucket | before
    if halves and zero.stage == 2:  # they are added where they are
        own = before
    reduce = bucket | summed | own | (before if zero.stage == 2 else {})
    step = own if halves else own | {"gradients of a group": FP32 * -(-parameters.largest_group // ranks)}
    moments = {"backward": backward, "reduce": reduce, "step": step}
    if platform.kind == "cpu" and ranks > 1:  # gloo gathers into a flat copy
        moments["gather"] = {"weights being gathered": zero.weight_bytes * parameters.largest_group}
    return held, moments


def _stage_3(
    parameters: Parameters, activations: Activations, zero: Zero, ranks: int, platform: Platform
) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """Everything divided; weights are gathered for forward and stay until backward is done, up to ``max_live``."""
    trained, everything = parameters.trained, parameters.trained + parameters.frozen
    part = -(-trained // ranks)
    halves = zero.weight_bytes < FP32
    held = {
        "weights": zero.weight_bytes * part,
        "frozen weights": zero.weight_bytes * -(-parameters.frozen // ranks),
        "masters": FP32 * part if halves else 0,  # in fp32 the working weights are the masters
        "moments": 2 * FP32 * part,
        "this rank's gradients": FP32 * part,
    }
    if zero.offload_optimizer:
        del held["masters"], held["moments"], held["this rank's gradients"]
    if zero.offload_weights:
        del held["weights"], held["frozen weights"]
    filled = min(trained, zero.reduce_bucket)
    held["buckets"] = zero.weight_bytes * (filled if platform.kind == "cpu" else zero.reduce_bucket)
    gathered = {"gathered weights": zero.weight_bytes * min(everything, zero.max_live)}
    copies = 2 if platform.kind == "cpu" else 1  # gloo sums in a copy
    largest = {"gradients being summed": copies * zero.weight_bytes * max(filled, parameters.largest)}
    step = {"gradients of a group": FP32 * -(-parameters.largest_group // ranks)}
    backward = gathered | {"activations": activations.peak} | largest
    return held, {"backward": backward, "step": step}


def _offloaded(parameters: Parameters, zero: Zero, ranks: int) -> dict[str, int]:
    """What offloading puts into the memory of the node, for each rank."""
    part = -(-parameters.trained // ranks)
    host: dict[str, int] = {}
    if zero.offload_optimizer:
        host |= {"masters": FP32 * part, "moments": 2 * FP32 * part, "this rank's gradients": FP32 * part}
    if zero.offload_weights:
        host["weights"] = zero.weight_bytes * -(-(parameters.trained + parameters.frozen) // ranks)
    return host


def _small_blocks(
    moments: Mapping[str, Mapping[str, int]], parameters: Parameters, activations: Activations, zero: Zero
) -> tuple[int, dict[str, dict[str, int]]]:
    """What a process keeps of its small blocks once they were used, and the moments without them.

    They are reused from moment to moment, so the most that any had is held for good: of activations, of what has the
    shape of parameters, and of the model while it was built (at stage 0 it is trained in those blocks).
    """
    share = parameters.below(HEAP_BLOCK // FP32) / max(parameters.trained, 1)
    built = {0: 0, 3: parameters.below(HEAP_BLOCK // FP32) + parameters.frozen}
    most = FP32 * built.get(zero.stage, parameters.below(HEAP_BLOCK // FP32))
    large: dict[str, dict[str, int]] = {}
    for moment, parts in moments.items():
        small = 0
        large[moment] = dict(parts)
        for name, size in parts.items():
            if name == "activations":
                own = activations.small_peak if size == activations.peak else size - activations.large_peak
                rest = min(activations.large_peak, size)
            else:
                own = round(share * size) if name in SHAPED else 0
                rest = size - own
            small += own
            large[moment][name] = rest
        most = max(most, small)
    return most, large
