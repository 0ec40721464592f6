"""Dropout of states; on a CPU with cheaper random numbers than PyTorch's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.cpu import door


def dropout(states: Tensor, rate: float) -> Tensor:
    """Dropout for training."""
    if rate == 0 or not door.is_open(states.device):
        return F.dropout(states, rate)
    return states * door.dropout_factors(states.shape, rate, states.dtype)


def dropout_add(update: Tensor, states: Tensor, rate: float) -> Tensor:
    """dropout(update) + states, in one operation on a CPU."""
    if rate == 0 or not door.is_open(states.device):
        return F.dropout(update, rate) + states
    return torch.addcmul(states, update, door.dropout_factors(update.shape, rate, update.dtype))
