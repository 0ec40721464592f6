"""The pages for developers name files that exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = ("README.md", *(f"docs/{name}.md" for name in ("architecture", "checkpoints", "data")))
PAGES += tuple(f"docs/{name}.md" for name in ("faults", "incidents", "launchers", "machines", "resume", "runbook"))
PAGES += tuple(f"docs/{name}.md" for name in ("export", "how_do_i", "scale", "scaling", "security", "serve"))
PAGES += tuple(f"docs/{name}.md" for name in ("speedrun", "use"))


def named_files(text: str) -> list[str]:
    """Python and YAML files in backquotes, with {a,b} written out; patterns like NAME.yaml and *.yaml are left out."""
    found = []
    for name in re.findall(r"`([\w./{},]+\.(?:py|yaml))`", text):
        head, braces, tail = name.partition("{")
        choices, _, rest = tail.partition("}")
        found += [head + choice + rest for choice in choices.split(",")] if braces else [name]
    return [name for name in found if not re.search(r"\b(NAME|FILE|DIR|RUN)\b", name)]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_files_that_exist(page: str) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = {path for path in listed.stdout.splitlines() if (REPOSITORY / path).is_file()}
    base_names = {path.rpartition("/")[2] for path in files}
    names = named_files((REPOSITORY / page).read_text(encoding="utf-8"))
    missing = [name for name in names if name not in (files if "/" in name else base_names)]
    assert not missing, f"{page} names {missing}, which are not there"


def test_braces_are_written_out() -> None:
    assert named_files("`a/{b,c}.py`, `d.yaml`, `x/NAME.yaml`, `*.py`, `e.f`") == ["a/b.py", "a/c.py", "d.yaml"]
