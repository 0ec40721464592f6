"""Activation checkpointing: what a layer would keep for backward is computed anew instead, to save memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def run(layer: Callable[..., Any], *inputs: Any, recompute: bool) -> Any:
    """``layer(*inputs)``; with ``recompute`` its inputs only are kept, and it runs again in backward.

    Results and gradients are the same to the bit: the second run draws the random numbers of the first. It ends by an
    exception within the last module whose backward needs anything. So that module's weights, which ZeRO-3 has just
    gathered for its backward, are not released again.
    """
    if not recompute or not torch.is_grad_enabled():
        return layer(*inputs)
    return checkpoint(layer, *inputs, use_reentrant=False, early_stop=True)
