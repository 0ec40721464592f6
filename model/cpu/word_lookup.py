"""Look-up in a word table on a CPU, whose gradient is written to the same memory in every step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.cpu.kept_memory import KeptMemory


def look_up(weight: Tensor, ids: Tensor, padding_idx: int, memory: KeptMemory) -> Tensor:
    """Rows [S, D] of ``weight`` [V, D] by ``ids`` int64 [S]; row ``padding_idx`` has no gradient."""
    return _LookUp.apply(weight, ids, padding_idx, memory)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, ids: Tensor, padding_idx: int, memory: KeptMemory) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.padding_idx, ctx.memory = weight.shape, padding_idx, memory
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (ids,) = ctx.saved_tensors
        weight_grad = ctx.memory.empty(ctx.shape, grad.dtype, grad.device).zero_().index_add_(0, ids, grad)
        weight_grad[ctx.padding_idx] = 0
        return weight_grad, None, None, None
