"""The one door to what the model does in its own way on a CPU, where PyTorch's operations are slow.

Behind it: dropout with cheaper random numbers, attention without padding where weights are dropped out, attention of
language models in bf16, and memory used again for the gradients of the two vocabulary tables. On other devices, under
torch.compile, and while the door is shut, PyTorch's own operations run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from model.cpu.dropout import dropout_factors
from model.cpu.half_attention import half_attention
from model.cpu.kept_memory import KeptMemory
from model.cpu.row_attention import RowAttention, image_blocks, text_blocks
from model.cpu.word_lookup import look_up

__all__ = [
    "KeptMemory",
    "RowAttention",
    "dropout_factors",
    "half_attention",
    "image_blocks",
    "is_open",
    "look_up",
    "shut",
    "text_blocks",
]

_shut = False


def is_open(device: torch.device) -> bool:
    """Whether work on ``device`` is done in the CPU's own way."""
    return device.type == "cpu" and not _shut and not torch.compiler.is_compiling()


@contextmanager
def shut() -> Iterator[None]:
    """For tests: a CPU runs what a GPU runs. The way taken forward is also taken backward."""
    global _shut
    before, _shut = _shut, True
    try:
        yield
    finally:
        _shut = before
