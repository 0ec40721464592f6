"""Finds the reference dumps of the released model's behaviour, which are not part of the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


def oracle_file(name: str) -> Path:
    """The dump ``name`` in the folder $OPENFLM_ORACLE; skips the test where there is none."""
    folder = Path(os.environ.get("OPENFLM_ORACLE", Path(__file__).resolve().parents[2] / "shared" / "oracle" / "flm"))
    if not (folder / name).is_file():
        pytest.skip(f"no reference dump {name}: set OPENFLM_ORACLE to the folder that holds it")
    return folder / name


def load_oracle(name: str) -> dict:
    return torch.load(oracle_file(name), weights_only=True)
