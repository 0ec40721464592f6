"""Tests that the demo runs from images to report with the real launcher, goes on where it was, and reports failures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def demo(folder: Path, *options: str, launcher: Path | None = None) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(launcher or ""), str(Path(sys.executable).parent), os.environ["PATH"]])
    places = ["--work", str(folder / "work"), "--output", str(folder / "run")]
    command = [sys.executable, "scripts/demo.py", *places, "--train", "160", "--dev", "16", "--steps", "3", *options]
    environment = {**os.environ, "PATH": path.lstrip(os.pathsep)}
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=400, env=environment)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_demo_from_images_to_report(tmp_path: Path) -> None:
    first = demo(tmp_path)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    table = first.stdout.split("== result")[1]
    for words in ("flm loss", "shuffled images", "exact match", "main colour and shape", "report.html"):
        assert words in table
    html = (tmp_path / "run" / "report.html").read_text()
    assert "Held-out loss" in html and html.count("data:image/jpeg;base64,") == 16

    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "deepspeed").write_text("#!/bin/sh\necho the launcher is ill >&2\nexit 7\n")
    (broken / "deepspeed").chmod(0o755)
    second = demo(tmp_path, launcher=broken)
    assert second.returncode == 7  # the code of the stage that failed
    assert "img2dataset" not in second.stdout  # what was there was not made again
    assert "the launcher is ill" in second.stderr
    assert second.stderr.splitlines()[-1].startswith("error: `deepspeed ")


def test_demo_explains_itself() -> None:
    done = demo(Path("unused"), "--help")
    assert done.returncode == 0 and "--fresh" in done.stdout
