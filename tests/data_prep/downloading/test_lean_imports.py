"""The downloader's processes start without what img2dataset imports and we never use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from data_prep.downloading.lean_imports import leave_out_unused
leave_out_unused()  # as a process that makes parts does
import data_prep.downloading.bounded_download
print(*sorted({"torch", "scipy", "pydantic", "pandas"} & {name for name, module in sys.modules.items() if module}))
"""


@pytest.mark.slow
def test_the_downloader_does_not_load_what_it_does_not_use() -> None:
    """torch alone takes 3 s of CPU and 300 MB in each process; albumentations loads scipy, wandb loads pydantic."""
    repository = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=repository, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "pandas\n"
