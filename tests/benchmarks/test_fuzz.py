"""Mutated inputs end in an acceptance or in the reader's own error; the fuzz itself sees what it is there to see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
INPUTS = int(os.environ.get("OPENFLM_FUZZ_INPUTS", "500"))


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.timeout(120 + INPUTS // 10)
def test_no_mutated_input_ends_in_a_traceback_a_hang_or_a_file_elsewhere(tmp_path: Path) -> None:
    """Invariant 7."""
    done = run("-m", "benchmarks.proof.fuzz", "--inputs", str(INPUTS), "--json", str(tmp_path / "counts.json"))
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "counts.json").read_text())
    assert found["findings"] == 0 and sum(sum(counts.values()) for counts in found["counts"].values()) == INPUTS
    assert len(found["counts"]) == 14


CAUGHT = """
import os, random, subprocess, sys
from pathlib import Path
from benchmarks.proof.fuzz import Finding, Watch, run_one
from benchmarks.proof.fuzz_targets import Target

root = Path(sys.argv[1])
watch = Watch(root / "inside")
uses = {
    "traceback": lambda folder, files: {}["x"],
    "write": lambda folder, files: open(root / "outside", "w").close(),
    "folder": lambda folder, files: os.mkdir(root / "other"),
    "read": lambda folder, files: open(root / "do-not-open").close(),
    "link": lambda folder, files: (os.symlink(root, folder / "link"), open(folder / "link" / "through", "w").close()),
    "program": lambda folder, files: subprocess.run(["true"]),
    "nothing": lambda folder, files: (folder / "mine").write_text("x") and None,
    "refused": lambda folder, files: int("no number"),
}
(root / "do-not-open").write_text("x")
for name, use in uses.items():
    target = Target(name, lambda generator: {"a": b"content"}, use, (ValueError,) if name == "refused" else ())
    try:
        print(name, run_one(target, 0, root / "inside", watch))
    except Finding as finding:
        print(name, "FINDING", str(finding).splitlines()[0])
"""


@pytest.mark.slow
def test_the_fuzz_notices_what_it_looks_for(tmp_path: Path) -> None:
    done = run("-c", CAUGHT, str(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert lines.pop("nothing") == "accepted" and lines.pop("refused").startswith("ValueError: invalid literal")
    assert len(lines) == 6 and all(line.startswith("FINDING") for line in lines.values()), lines
    assert lines["traceback"].startswith("FINDING KeyError") and "subprocess" in lines["program"]
