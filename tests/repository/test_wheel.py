"""The wheel that ``pip install .`` builds: it holds every file the packages need, and works far from the repository."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from openflm.commands import MODULES
from tests.pipeline.data.test_reader import jpeg
from tests.tiny_runs import write_data, write_kind

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("openflm", "model", "data_prep", "pipeline")
DATA = ("pipeline/recipes", "pipeline/reporting/templates", "data_prep/reporting/templates", "pipeline/ds_configs")
DATA += ("pipeline/serving/page",)
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


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a fresh virtual environment with the wheel and its console commands; of the environment of the
    tests it sees what is installed there, and nothing of the repository."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    pip("--python", str(python), "install", "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel))
    (site,) = (folder / "lib").glob("python3*/site-packages")
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    return folder / "bin"


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


USE = (REPOSITORY / "docs" / "use.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.+?)^```", USE, re.M | re.S)
RUNS = {"captioner": "captioning", "vqa": "vqa", "nlvr2": "nlvr2", "retrieval": "retrieval", "evlgen": "evlgen_tome"}
PROGRAM = """
import json, sys
for number, snippet in enumerate(json.load(sys.stdin)):
    print(snippet, flush=True)
    exec(compile(snippet, f"snippet {number}", "exec"), {"__name__": "snippet"})
    print("done", number)
import openflm, model, pipeline
print([module.__file__ for module in (openflm, model, pipeline)])
"""


def clean_environment() -> dict[str, str]:
    """Without what would lead a fresh interpreter to the repository, or hide what a user without it meets."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def test_the_page_shows_every_member() -> None:
    assert len(SNIPPETS) >= 10 and all(len(one.splitlines()) <= 11 for one in SNIPPETS)
    members = ("caption", "caption_stream", "answer", "match", "index", "features", "attention", "merges")
    assert [name for name in members if not any(f"model.{name}(" in one for one in SNIPPETS)] == []


@pytest.mark.slow(60)
def test_every_snippet_of_the_page_runs_outside_the_clone(fresh: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    (tmp_path / "photos").mkdir()
    for number in (1, 2, 3):
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(jpeg(number))
    for name, kind in RUNS.items():
        write_kind(tmp_path / "runs" / name, data, kind)
    done = subprocess.run(
        [fresh / "python", "-c", PROGRAM],
        cwd=tmp_path,
        env=clean_environment(),
        input=json.dumps(SNIPPETS),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("done ") == len(SNIPPETS)
    places = done.stdout.splitlines()[-1]
    assert places.count(str(fresh.parent)) == 3 and str(REPOSITORY / "pipeline") not in places
    assert re.search(r"<model captioner: task captioning, objective flm, 32 px; can caption, features, match>", USE)
    assert "<model captioner: task captioning, objective flm, 32 px; can caption, features, match>" in done.stdout


def test_console_commands_are_programs_that_exist() -> None:
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert scripts == {f"openflm-{name}": f"openflm.commands:{name}" for name in MODULES}
    for name, module in MODULES.items():
        assert f"`openflm-{name}`" in USE and importlib.util.find_spec(module) is not None
        file = REPOSITORY / f"{module.replace('.', '/')}{'' if '.' in module else '/__main__'}.py"
        assert 'if __name__ == "__main__":' in file.read_text(encoding="utf-8")


@pytest.mark.slow
def test_console_commands_end_as_their_programs_do(fresh: Path, tmp_path: Path) -> None:
    def ended(*command: object) -> tuple[int, str, str]:
        done = subprocess.run(
            [str(word) for word in command], cwd=tmp_path, env=clean_environment(), capture_output=True, text=True
        )
        return done.returncode, done.stdout, done.stderr

    for name, arguments in (("data", ["--help"]), ("report", ["--run", "absent"]), ("status", ["absent", "--json"])):
        program = ended(fresh / "python", "-m", MODULES[name], *arguments)
        assert ended(fresh / f"openflm-{name}", *arguments) == program and any(program[1:])
    script = (fresh / "openflm-train").read_text()
    assert str(fresh) in script.splitlines()[0] and "openflm.commands" in script


def test_a_command_that_is_told_to_stop_while_it_imports_says_so(fresh: Path, tmp_path: Path) -> None:
    """As `python -m pipeline.generate` does: 75, before there is anything to stop."""
    (tmp_path / "torch.py").write_text("import pathlib, time\npathlib.Path('importing').touch()\ntime.sleep(60)\n")
    environment = clean_environment() | {"PYTHONPATH": str(tmp_path)}
    command = [fresh / "openflm-generate", "--run", "absent", "image.jpg"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as running:
        try:
            deadline = time.monotonic() + 60
            while not (tmp_path / "importing").exists():
                assert running.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)
            running.send_signal(signal.SIGTERM)
            _, error = running.communicate(timeout=60)
        finally:
            running.kill()
    assert (
        running.returncode == 75 and error == "error: told to stop by SIGTERM before the first step: nothing to save\n"
    )
