"""Finds the reference dumps of the released model's behaviour, which are not part of the repository."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch


def oracle_file(name: str, method: str = "flm") -> Path:
    """The dump ``name`` in $OPENFLM_ORACLE (of FLM) or $OPENFLM_ORACLE_EVLGEN; skips the test where there is none."""
    variable = "OPENFLM_ORACLE" + ("" if method == "flm" else f"_{method.upper()}")
    folder = Path(os.environ.get(variable, Path(__file__).resolve().parents[2] / "shared" / "oracle" / method))
    if not (folder / name).is_file():
        pytest.skip(f"no reference dump {name}: set {variable} to the folder that holds it")
    return folder / name


def load_oracle(name: str, method: str = "flm") -> Any:
    return torch.load(oracle_file(name, method), weights_only=True)
