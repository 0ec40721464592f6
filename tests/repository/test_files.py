"""What must not be in the repository: files named after nothing, and paths of somebody's machine."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}


def repository_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=REPOSITORY, capture_output=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = (REPOSITORY / name for name in listed.stdout.decode().split("\0") if name)
    return [path for path in files if path.is_file()]


def test_no_room_for_leftovers() -> None:
    offenders = [path.name for path in repository_files() if path.suffix == ".py" and path.stem in FORBIDDEN_NAMES]
    assert not offenders, f"{offenders}: name the file after its one job (docs/architecture.md, Find the room)"


def test_no_path_of_somebodys_machine() -> None:
    private = re.compile(r"(?<![\w.:/$}~-])/(work|root|home|Users)/\w")
    found = []
    for path in repository_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(REPOSITORY)}: {match.group()}" for match in private.finditer(text)]
    assert not found


def test_extras_have_names_that_any_pip_finds_and_are_those_that_are_named() -> None:
    """pip up to 23.2 looks for ``a_b`` where the metadata have ``a-b``, and installs nothing, with a warning."""
    extras = set(tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    assert all(name.isalnum() and name == name.lower() for name in extras)
    files = [path for path in repository_files() if path.suffix in (".md", ".py", ".yaml", ".sh")]
    texts = [path.read_text(encoding="utf-8") for path in files]
    named = {name for text in texts for name in re.findall(r"pip install (?:-e )?'\.\[(\w+)\]'", text)}
    assert named and named <= extras, named - extras
