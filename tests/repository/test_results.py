"""benchmarks/results: what is written down can be done again elsewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_no_command_names_a_folder_of_one_machine(path: Path) -> None:
    commands = re.findall(r'"command": ("(?:[^"\\]|\\.)*")', path.read_text(encoding="utf-8"))
    for command in map(json.loads, commands):
        assert not re.search(r"(?:^|[\s='])[/~]", command), command
