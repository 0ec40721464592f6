"""Tiny models of every kind, each made and loaded once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import openflm
from pipeline.using.model import Model
from tests.tiny_runs import write_data, write_kind


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("using") / "data")


@pytest.fixture(scope="session")
def model_of(tiny_data: Path) -> Callable[[str], Model]:
    """The model of a kind of ``tests/tiny_runs.py``."""
    found: dict[str, Model] = {}

    def load(kind: str) -> Model:
        if kind not in found:
            found[kind] = openflm.load(write_kind(tiny_data.parent / kind, tiny_data, kind), device="cpu")
        return found[kind]

    return load
