"""Dropout; on a CPU with cheaper random numbers than PyTorch's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.cpu.dropout import factors_on_cpu


def dropout(states: Tensor, rate: float) -> Tensor:
    """Dropout for training; on a CPU by ``factors_on_cpu``."""
    if rate == 0 or states.device.type != "cpu":
        return F.dropout(states, rate)
    return states * factors_on_cpu(states.shape, rate, states.dtype)


def dropout_add(update: Tensor, states: Tensor, rate: float) -> Tensor:
    """dropout(update) + states, in one operation on a CPU."""
    if rate == 0 or states.device.type != "cpu":
        return F.dropout(update, rate) + states
    return torch.addcmul(states, update, factors_on_cpu(update.shape, rate, update.dtype))
