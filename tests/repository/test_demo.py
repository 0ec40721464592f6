"""Tests that the demo runs from images to report with the real launcher, goes on where it was, and reports failures."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.recording.run_log import read_log
from tests.tiny_frozen_parts import write_language_model

REPOSITORY = Path(__file__).resolve().parents[2]


@contextmanager
def started(folder: Path, *options: str, launcher: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """A demo that ends, with all that it has started, when the test does."""
    path = os.pathsep.join(
        [*([str(launcher)] if launcher else []), str(Path(sys.executable).parent), os.environ["PATH"]]
    )
    places = ["--work", str(folder / "work"), "--output", str(folder / "run")]
    command = [sys.executable, "scripts/demo.py", *places, "--train", "160", "--dev", "16", "--steps", "3", *options]
    pipe, environment = subprocess.PIPE, {**os.environ, "PATH": path}
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.terminate()


@pytest.mark.extended
@pytest.mark.slow(90)
@pytest.mark.timeout(600)
def test_demo_of_evlgen(tmp_path: Path) -> None:
    """From images to captions and pictures of merges, with a language model of bytes."""
    write_language_model(tmp_path / "llm")
    places = ["--work", tmp_path / "work", "--output", tmp_path / "run", "--language", tmp_path / "llm"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [sys.executable, "scripts/demo_evlgen.py", *places, "--train", "32", "--dev", "4", "--steps", "1"]
    words, environment = list(map(str, command)), {**os.environ, "PATH": path}
    found = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, env=environment, timeout=500)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    table = found.stdout.split("== result")[1]
    assert "caption loss" in table and "main colour and shape" in table and "report.html" in table
    assert "which patches became one" in (tmp_path / "run" / "report.html").read_text()


def demo(folder: Path, *options: str, launcher: Path | None = None) -> subprocess.CompletedProcess[str]:
    with started(folder, *options, launcher=launcher) as process:
        out, err = process.communicate(timeout=400)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.mark.slow(100)
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


@pytest.mark.extended
@pytest.mark.slow(150)
@pytest.mark.timeout(900)
def test_interrupted_it_has_saved(tmp_path: Path) -> None:
    assert demo(tmp_path).returncode == 0
    with started(tmp_path, "--steps", "100000") as second:  # goes on after step 3, until Ctrl-C
        log, deadline = tmp_path / "run" / "log.jsonl", time.monotonic() + 200
        while not any(record["step"] > 3 for record in read_log(log)) and time.monotonic() < deadline:
            time.sleep(0.5)
        second.send_signal(signal.SIGINT)
        _, err = second.communicate(timeout=120)
    assert second.returncode == 130 and err.splitlines()[-1].startswith("interrupted"), err[-2000:]
    newest = max(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_????????"))
    assert newest > "step_00000003"  # what was learnt until then is saved


def test_demo_explains_itself() -> None:
    done = demo(Path("unused"), "--help")
    assert done.returncode == 0 and "--fresh" in done.stdout
