"""Finds the reference dumps of the released model's behaviour, which are not part of the repository."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import VisionConfig

FORWARD, GRADIENT = 2e-4, 2e-3  # tolerances of EVLGen's dumps


def oracle_file(name: str, method: str = "flm") -> Path:
    """The dump ``name`` in $OPENFLM_ORACLE (of FLM) or $OPENFLM_ORACLE_EVLGEN; skips the test where there is none."""
    variable = "OPENFLM_ORACLE" + ("" if method == "flm" else f"_{method.upper()}")
    folder = Path(os.environ.get(variable, Path(__file__).resolve().parents[2] / "shared" / "oracle" / method))
    if not (folder / name).is_file():
        pytest.skip(f"no reference dump {name}: set {variable} to the folder that holds it")
    return folder / name


def load_oracle(name: str, method: str = "flm") -> Any:
    return torch.load(oracle_file(name, method), weights_only=True)


def assert_near(mine: Tensor, theirs: Tensor, relative: float = FORWARD) -> None:
    """As far apart as EVLGen's dumps allow (their README): max |a - b| / max(1, max |b|)."""
    assert mine.shape == theirs.shape
    assert (mine - theirs).detach().abs().max() <= relative * theirs.detach().abs().max().clamp(min=1)


def eva_config(sizes: Mapping[str, Any]) -> VisionConfig:
    """The tower of EVLGen's dumps."""
    return VisionConfig(
        name=None,
        image_size=sizes["img_size"],
        patch_size=sizes["patch_size"],
        width=sizes["embed_dim"],
        layers=sizes["depth"],
        head_width=sizes["embed_dim"] // sizes["num_heads"],
        mlp_ratio=sizes["mlp_ratio"],
        quick_gelu=False,
        drop_last_block=False,
        layout="eva",
    )
