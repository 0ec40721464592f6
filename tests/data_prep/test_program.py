"""Programs whose output nobody reads, or finds no room, and what they leave behind."""

from __future__ import annotations

import ast
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.__main__ import main
from data_prep.checks.info import all_splits

REPOSITORY = Path(__file__).resolve().parents[2]
PRINTS = "def main():\n    for n in range(9999): print('line', n)\n    return 3\n"


def run(program: str, stdout: int, unbuffered: bool = False) -> tuple[int, str]:
    """Exit code and stderr of a program of lines; ``stdout`` is closed here."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1" if unbuffered else ""}
    lines = f"import sys\nfrom data_prep.program import *\n{program}"
    try:
        done = subprocess.run(
            [sys.executable, "-c", lines],
            cwd=REPOSITORY,
            env=environment,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    finally:
        os.close(stdout)
    return done.returncode, done.stderr


def nobody_reads() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize(
    ("program", "code"),
    [
        (PRINTS + "run_program(main)", 141),
        ("run_program(lambda: print('little') or 3)", 141),  # found out at the end only
        ("import argparse\nrun_program(lambda: argparse.ArgumentParser().parse_args(['--help']))", 141),
        (PRINTS + "outlive_readers()\nsys.exit(main())", 3),
        (PRINTS + "sys.stdout, sys.stderr = sys.stderr, sys.stdout\noutlive_readers()\nsys.exit(main())", 3),
    ],
)
def test_a_reader_that_went_away_is_no_traceback(program: str, code: int) -> None:
    found, message = run(program, nobody_reads())
    assert found == code and (message == "" or "sys.stderr, sys.stdout" in program and "Traceback" not in message)


def test_ctrl_c_is_one_line() -> None:
    lines = "def main():\n    raise KeyboardInterrupt\nrun_program(main)"
    assert run(lines, os.open(os.devnull, os.O_WRONLY)) == (130, "interrupted\n")


def test_another_broken_pipe_is_an_error() -> None:
    lines = "import os\ndef main():\n    r, w = os.pipe(); os.close(r); os.write(w, b'x')\nrun_program(main)"
    code, message = run(lines, os.open(os.devnull, os.O_WRONLY))
    assert code == 1 and "BrokenPipeError" in message


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("unbuffered", [False, True])
def test_output_on_a_full_disk_is_one_line(unbuffered: bool) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    code, message = run("run_program(lambda: print('little') or 0)", full, unbuffered)
    assert (code, message) == (2, "error: No space left on device\n")
    full = os.open("/dev/full", os.O_WRONLY)
    assert run("outlive_readers()\nprint('little')\nsys.exit(75)", full, unbuffered) == (75, "")


def test_what_the_encoding_lacks_is_printed_with_escapes() -> None:
    lines = "sys.stdout.reconfigure(encoding='ascii', errors='strict')\nrun_program(lambda: print('caf\\udce9 é') or 0)"
    assert run(lines, os.open(os.devnull, os.O_WRONLY)) == (0, "")


def test_every_program_ends_this_way() -> None:
    programs = {"data_prep/__main__.py", *(f"pipeline/{path.name}" for path in (REPOSITORY / "pipeline").glob("*.py"))}
    for name in programs - {"pipeline/__init__.py", "pipeline/train.py"}:  # training outlives its readers
        last = ast.parse((REPOSITORY / name).read_text(encoding="utf-8")).body[-1]
        assert ast.unparse(last).endswith("run_program(main)"), name


@pytest.fixture
def full_disk():
    """No file of this process may grow beyond 100 kB: writing fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_nothing_half_written(tmp_path, capsys, full_disk) -> None:
    """Invariant 6."""
    options = ["--train", "200", "--dev", "0", "--test", "0", "--pair-share", "0", "--workers", "1"]
    assert main(["synth", "--output", str(tmp_path / "synth"), *options]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert not (tmp_path / "synth").exists()


def test_an_output_that_is_a_file_or_in_one_is_named(tmp_path, capsys) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    (tmp_path / "rows.tsv").write_text("url\tcaption\n")
    for output in (file, file / "below"):
        for verb in (["synth"], ["urls", "--input", str(tmp_path / "rows.tsv")]):
            assert main([*verb, "--output", str(output)]) == 2
            assert capsys.readouterr().err == f"error: {file}: a file, expected a folder; give another --output\n"
    assert file.read_text() == "mine"


def test_an_address_is_no_path(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["info", "s3://bucket/corpus"])
    assert ended.value.code == 2 and "'s3://bucket/corpus', expected a path" in capsys.readouterr().err


def test_shards_of_other_programs_are_called_so(tmp_path) -> None:
    from data_prep.manifest import ManifestError, find_splits

    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "00000.tar").touch()
    with pytest.raises(ManifestError, match=r"shards of another program \(img2dataset, webdataset\)") as refused:
        find_splits(tmp_path, "train")
    assert "remove" not in str(refused.value) and "data_prep webdataset" in str(refused.value)
    assert all_splits(tmp_path)
