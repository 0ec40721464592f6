"""Reads the extracts of the released model's behaviour in tests/fixtures, and makes the weights behind them."""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor


def fixture_path(name: str) -> Path:
    return Path(__file__).parent / "fixtures" / f"{name}_released_tiny.safetensors"


def released_fixture(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
    """Tensors of the dump of an objective ("flm", "mlm" or "ar"), its state dict, its gradient norms by name."""
    with safe_open(fixture_path(name), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        if name == "flm":
            tensors["image"] = made_image()
        layout, names = json.loads(file.metadata()["layout"]), json.loads(file.metadata()["grad_norm_names"])
    return tensors, made_weights(layout), dict(zip(names, tensors["grad_norms"].tolist(), strict=True))


def made_image() -> Tensor:
    """The images of the dumps, noise, to the rounding of a processor's logarithm and cosine: fp32 [4, 3, 96, 96]."""
    return torch.randn(4, 3, 96, 96, generator=torch.Generator().manual_seed(11))


def made_weights(layout: list[list]) -> dict[str, Tensor]:
    """Weights from their names: ``layout`` lists name, shape, and the name that the same tensor was first given."""
    state = {}
    for name, shape, first_name in layout:
        random = np.random.RandomState(zlib.crc32(first_name.encode()) & 0x7FFFFFFF).standard_normal(shape)
        if re.search(r"(LayerNorm|ln_\w+)\.weight$", name):
            random = 1 + 0.1 * random
        else:
            random = random * (0.08 if len(shape) > 1 else 0.05)
        state[name] = torch.tensor(random).float()
    return state
