"""The wheel that ``pip install .`` builds: it holds every file the packages need, and works far from the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("model", "data_prep", "pipeline")
DATA = (
    "pipeline/recipes",
    "pipeline/reporting/templates",
    "data_prep/reporting/templates",
    "pipeline/ds_configs",
    "pipeline/serving/page",
)
UNWANTED = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without a network from a copy, so that neither leaves anything in the other."""
    copy, folder = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for name in (*PACKAGES, "tests", "benchmarks", "scripts", "ds_configs"):
        shutil.copytree(REPOSITORY / name, copy / name, symlinks=True, ignore=UNWANTED)
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, copy / name)
    offline = ["--no-deps", "--no-index", "--disable-pip-version-check"]
    pip("wheel", *offline, "--no-build-isolation", "--wheel-dir", str(folder), str(copy))
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-index", "--disable-pip-version-check", "--target", str(target), str(wheel))
    return target


def pip(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def run(target: Path, folder: Path, *arguments: str) -> str:
    """What python prints when it is started in ``folder`` with the installed packages as its only way to ours."""
    environment = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_it_holds_the_packages_whole_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py")}
    expected |= {path for folder in DATA for path in (REPOSITORY / folder).iterdir() if path.is_file()}
    assert found == {path.relative_to(REPOSITORY).as_posix() for path in expected}


def test_every_file_that_is_no_python_is_among_its_data() -> None:
    others = {path for package in PACKAGES for path in (REPOSITORY / package).rglob("*") if path.suffix != ".py"}
    folders = {path.parent.relative_to(REPOSITORY).as_posix() for path in others if path.is_file()}
    assert {folder for folder in folders if "__pycache__" not in folder} <= set(DATA)


@pytest.mark.slow(25)
def test_it_trains_reports_and_captions_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    run(installed, tmp_path, "-m", "data_prep", "--help")
    sizes = ["--train", "40", "--dev", "8", "--test", "2", "--image-size", "32", "--workers", "1", "--pair-share", "0"]
    run(installed, tmp_path, "-m", "data_prep", "synth", *sizes)
    run(installed, tmp_path, "-m", "data_prep", "tokenizer", "--vocab-size", "400")
    options = ["--recipe", "flm_tiny", "--output", "run", "--train.steps", "1", "--tracking.tensorboard", "false"]
    printed = run(installed, tmp_path, "-m", "pipeline.train", *options)
    assert str(installed / "pipeline" / "ds_configs" / "zero1.json") in printed
    run(installed, tmp_path, "-m", "pipeline.report", "--run", "run")
    assert "<svg" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    captioned = run(installed, tmp_path, "-m", "pipeline.generate", "--run", "run", "--data", "data", "--samples", "2")
    assert "captions: 2" in captioned


@pytest.mark.slow
def test_programs_start_by_module_and_by_path(installed: Path, tmp_path: Path) -> None:
    assert "--beams" in run(installed, tmp_path, "-m", "pipeline.generate", "--help")
    by_path = run(installed, tmp_path, str(installed / "pipeline" / "train.py"), "--help")
    by_module = run(installed, tmp_path, "-m", "pipeline.train", "--help")
    assert by_path == by_module and "--recipe" in by_path and "flm_base_4m" in by_path
    program = "from pipeline.config.command_line import parse_command_line as parse; print(parse([]).recipe)"
    assert run(installed, tmp_path, "-c", program).strip() == "flm_base_4m"
