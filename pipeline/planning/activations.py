"""What one forward and backward pass keeps in memory, found by running the real network on PyTorch's meta device.

Weights are on the meta device, which knows shapes but no values; the plan of the batch is real. Every storage that an
operation allocates is counted until it dies. The kernels of a device stand in for PyTorch's meta ones where they
allocate something else: attention keeps no weights, dropout on a GPU keeps a byte an element.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from model.batch import Batch
from model.cpu import door

DeviceKind = Literal["cuda", "cpu"]


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on one rank, weights and summed gradients not among them.

    ``kept`` is what backward is owed at the end of the forward pass; ``peak`` the most that is held at a time, the
    gradients of the parameters each until it is handed over; ``peak_with_gradients`` counts those from then on too.
    ``small_peak`` is the ``peak`` of storages below the size that was given, ``large_peak`` that of all others.
    ``operations`` ran, views not counted, and read and wrote ``traffic`` bytes.
    """

    kept: int
    peak: int
    peak_with_gradients: int
    small_peak: int
    large_peak: int
    operations: int
    traffic: int


def measure(
    objective: nn.Module, batch: Batch, term_weights: Mapping[str, float], kind: DeviceKind, large_bytes: int = 1 << 62
) -> Activations:
    """The activations of ``objective(batch)`` and its backward pass on a device of ``kind``, in its training mode.

    Args:
        objective: on the meta device, in the dtype it trains in.
        batch: its images on the meta device, its plan on the host.
        term_weights: of the loss terms.
        kind: whose kernels run.
        large_bytes: from which size on a storage is large.
    """
    with ExitStack() as stack:
        if kind == "cuda":
            stack.enter_context(door.shut())
        allocated = stack.enter_context(_Allocated(objective, large_bytes))
        for parameter in objective.parameters():
            if parameter.requires_grad:
                stack.callback(parameter.register_post_accumulate_grad_hook(allocated.hand_over).remove)
        stack.enter_context(_Kernels(kind))
        sums = objective(batch)
        loss = sum(term_weights[name] * value for name, value in sums.items())
        del sums
        kept = allocated.all.live
        _backward(loss)
    return Activations(
        kept=kept,
        peak=allocated.all.peak,
        peak_with_gradients=allocated.with_gradients.peak,
        small_peak=allocated.small.peak,
        large_peak=allocated.large.peak,
        operations=allocated.operations,
        traffic=allocated.traffic,
    )


def _backward(loss: Tensor) -> None:
    """``loss.backward()``, during which the function modes that are entered would rest."""
    torch.autograd.Variable._execution_engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


class _Tally:
    """Bytes that are held now, and the most that ever were."""

    def __init__(self) -> None:
        self.live = self.peak = 0

    def add(self, num_bytes: int) -> None:
        self.live += num_bytes
        self.peak = max(self.peak, self.live)


class _Allocated(TorchDispatchMode):
    """Counts the storages on the meta device that operations inside it make, each until it dies."""

    def __init__(self, objective: nn.Module, large_bytes: int) -> None:
        super().__init__()
        self.all, self.with_gradients, self.small, self.large = _Tally(), _Tally(), _Tally(), _Tally()
        self.operations = self.traffic = 0
        self._large_bytes = large_bytes
        tensors = [*objective.parameters(), *objective.buffers()]
        self._known = {tensor.untyped_storage()._cdata for tensor in tensors}

    def hand_over(self, parameter: Tensor) -> None:
        """Drop a gradient that is complete; it stays among those ``with_gradients``."""
        self.with_gradients.add(parameter.grad.nbytes)
        parameter.grad = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.device.type == "meta"]
        for tensor in made:
            self._count(tensor.untyped_storage())
        if made and not func.is_view:
            read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.operations += 1
            self.traffic += sum(tensor.nbytes for tensor in [*read, *made])
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        num_bytes = storage.nbytes()
        for tally in self._tallies(num_bytes):
            tally.add(num_bytes)
        weakref.finalize(storage, self._forget, key, num_bytes).atexit = False

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        for tally in self._tallies(num_bytes):
            tally.add(-num_bytes)

    def _tallies(self, num_bytes: int) -> tuple[_Tally, _Tally]:
        return self.all, self.with_gradients, self.large if num_bytes >= self._large_bytes else self.small


class _Kernels(TorchFunctionMode):
    """Lets tensors of the plan meet those on the meta device; attention and dropout keep what ``kind`` keeps."""

    def __init__(self, kind: DeviceKind) -> None:
        super().__init__()
        self._kind = kind
        self._moved = WeakTensorKeyDictionary()  # a tensor of the plan is on the device once

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return _fused_attention(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        if any(isinstance(leaf, Tensor) and leaf.device.type == "meta" for leaf in leaves):
            args, kwargs = tree_map(self._to_meta, (tuple(args), kwargs))
        return func(*args, **kwargs)

    def _to_meta(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.device.type != "cpu" or not value.ndim:
            return value
        if value not in self._moved:
            self._moved[value] = value.to("meta")
        return self._moved[value]

    def _dropout(self, states: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return states
        if self._kind == "cuda":
            return torch.native_dropout(states, p, True)[0]  # keeps a boolean mask
        return states * torch.empty_like(states)  # model/cpu/dropout.py: factors in the dtype of the states


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **_: Any
) -> Tensor:
    bias = None if attn_mask is None else torch.empty(attn_mask.shape, dtype=query.dtype, device="meta")
    return _FusedAttention.apply(query, key, value, bias)


class _FusedAttention(torch.autograd.Function):
    """Memory of PyTorch's flash and memory-efficient kernels: inputs, output and a log-sum-exp (Dao et al. 2022, arXiv
    2205.14135); a boolean mask becomes a bias in the dtype of the queries."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        mixed = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]).transpose(1, 2)
        log_sums = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, bias, mixed, log_sums)
        return mixed

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None
