"""Tests that torchvision and what stands on it import beside any PyTorch build."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = """
from model.torchvision_shim import ensure_torchvision
first = ensure_torchvision()
assert ensure_torchvision() is first
import torch, torchvision
from torchvision.transforms import v2
assert v2.Resize(4)(torch.zeros(3, 8, 8)).shape == (3, 4, 4)
import open_clip
assert ensure_torchvision() is first
ensure_torchvision.cache_clear()
assert ensure_torchvision() is None  # a late call changes nothing
"""


@pytest.mark.slow
def test_torchvision_imports_after_the_shim() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=REPOSITORY, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
