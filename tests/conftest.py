"""Test settings: few threads, no network trackers, slow tests last with a longer time limit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

REPOSITORY = Path(__file__).resolve().parents[1]
SLOW_TIMEOUT_SECONDS = 420

for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "MPLBACKEND": "Agg",
    "TORCH_EXTENSIONS_DIR": str(REPOSITORY / ".cache" / "torch_extensions"),
}.items():
    os.environ.setdefault(_name, _value)

settings.register_profile("openflm", deadline=None)  # a busy machine is no failure; pytest's own limit stands
settings.load_profile("openflm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs the slow tests after all others and gives them time, unless they ask for a limit of their own."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_SECONDS))
