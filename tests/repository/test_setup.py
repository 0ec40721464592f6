"""Tests of scripts/setup.sh and the Makefile with a stand-in Python that records what it is asked to do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
STAND_IN = r"""#!/bin/bash
echo "$*" >>"$CALLS"
case "$*" in
    -V) echo "Python ${VERSION:-3.11.9}" ;;
    *ensurepip*) [ -z "${NO_VENV:-}" ] ;;
    *-venv*version_info*) echo python3.11-venv ;;
    *version_info*) [ -z "${TOO_OLD:-}" ] ;;
    "-m venv --clear .venv") rm -rf .venv && mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    "-m pip "*)
        echo "cache: ${PIP_NO_CACHE_DIR:-kept}" >>"$CALLS"
        [ -z "${PIP_FAILS:-}" ] || { echo "ERROR: no space left"; exit 1; }
        printf '#!%s/.venv/bin/python\nname = "launcher"\n' "$PWD" >.venv/bin/launcher
        chmod 755 .venv/bin/launcher ;;
    *urlopen*) exit 1 ;;
    *mpi4py*) [ -z "${NO_MPI:-}" ] ;;
esac
"""


class Checkout:
    """A copy of the setup script beside requirements, on a machine without root, sudo and network."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, folder / "calls"
        (folder / "scripts").mkdir()
        shutil.copy(REPOSITORY / "scripts" / "setup.sh", folder / "scripts")
        (folder / "requirements.txt").write_text("torch==2.13.0\n")
        self.bin = folder / "bin"
        self.bin.mkdir()
        self._program("python3", STAND_IN)
        self._program("id", "#!/bin/bash\necho 1000\n")
        self._program("sudo", "#!/bin/bash\nexit 1\n")

    def _program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def setup(self, **variables: str) -> tuple[int, str, list[str]]:
        """Exit code, output, and what Python was asked to do."""
        self.calls.write_text("")
        path = f"{self.bin}:/usr/bin:/bin"
        names = {"python3.11", "python3.12", "python3.13"}  # the system's own must not be found instead
        for name in names:
            self._program(name, '#!/bin/bash\nexec "${0%/*}/python3" "$@"\n')
        environment = {"PATH": path, "CALLS": str(self.calls), "HOME": str(self.folder), **variables}
        done = subprocess.run(
            ["bash", "scripts/setup.sh"], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=60
        )
        return done.returncode, done.stdout + done.stderr, self.calls.read_text().splitlines()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_first_setup_installs_and_the_next_does_nothing(checkout: Checkout) -> None:
    code, output, calls = checkout.setup()
    assert code == 0 and "ready after" in output
    assert "-m venv --clear .venv" in calls
    assert any(call.startswith("-m pip install") and call.endswith("-r requirements.txt") for call in calls)
    code, output, calls = checkout.setup()
    assert (code, output, calls) == (0, "", ["-V"])


def test_changed_requirements_or_interpreter_install_again(checkout: Checkout) -> None:
    checkout.setup()
    (checkout.folder / "requirements.txt").write_text("torch==2.12.0\n")
    code, _, calls = checkout.setup()
    assert code == 0 and "-m venv --clear .venv" not in calls and any("pip install" in call for call in calls)
    _, _, calls = checkout.setup(VERSION="3.12.1")
    assert any("pip install" in call for call in calls)


def test_interrupted_install_starts_from_an_empty_venv(checkout: Checkout) -> None:
    code, output, _ = checkout.setup(PIP_FAILS="1")
    assert code == 2 and output.splitlines()[-1].startswith("error: pip install failed") and "no space left" in output
    code, _, calls = checkout.setup()
    assert code == 0 and "-m venv --clear .venv" in calls
    assert checkout.setup()[2] == ["-V"]


def test_venv_made_by_hand_is_kept(checkout: Checkout) -> None:
    (checkout.folder / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(checkout.bin / "python3", checkout.folder / ".venv" / "bin" / "python")
    code, _, calls = checkout.setup()
    assert code == 0 and "-m venv --clear .venv" not in calls and any("pip install" in call for call in calls)


def test_mpi_library_is_added_where_there_is_none(checkout: Checkout) -> None:
    assert any("mpich==" in call for call in checkout.setup(NO_MPI="1")[2])


def test_tools_of_tests_are_installed_where_we_may_and_named_where_not(checkout: Checkout) -> None:
    for name in ("bash", "cat", "dirname", "env", "flock", "mkdir"):  # and nothing else of this machine
        (checkout.bin / name).symlink_to(shutil.which(name))
    checkout._program("apt-get", '#!/bin/bash\necho "$*" >>"$CALLS"\n')
    command = [checkout.bin / "bash", "scripts/setup.sh", "--test-tools"]
    environment = {"PATH": str(checkout.bin), "CALLS": str(checkout.calls), "HOME": str(checkout.folder)}
    for user, words in (
        ("1000", "skipped; install with: sudo apt-get install shellcheck"),
        ("0", "packages: shellcheck"),
    ):
        checkout._program("id", f"#!/bin/bash\necho {user}\n")
        done = subprocess.run(command, cwd=checkout.folder, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and words in done.stdout, done.stderr
    assert checkout.calls.read_text().splitlines()[1].startswith("install -y --no-install-recommends shellcheck")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NO_VENV": "1"}, "install it with: sudo apt-get install python3.11-venv"),
        ({"TOO_OLD": "1"}, "Python 3.11, 3.12 or 3.13 is missing; install it with: sudo apt-get install python3.11"),
        ({"PYTHON": "no-such-python"}, "PYTHON=no-such-python is not a Python 3.11, 3.12 or 3.13"),
    ],
)
def test_what_is_missing_is_named_in_one_line(checkout: Checkout, variables: dict[str, str], message: str) -> None:
    code, output, _ = checkout.setup(**variables)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and message in errors[0]


def test_a_full_disk_and_a_folder_of_somebody_else_are_named_before_anything_is_loaded(checkout: Checkout) -> None:
    checkout._program("df", "#!/bin/bash\necho Filesystem; echo /dev/vda 9999999 9000000 2000000 90% /\n")
    code, output, calls = checkout.setup()
    assert code == 2 and "error: 1 GiB are free in " in output and "make room" in output
    assert not any(call.startswith("-m ") for call in calls)
    shutil.rmtree(checkout.folder / ".cache")
    (checkout.folder / ".cache").write_text("")  # root may write in any folder, but not in a file
    code, output, calls = checkout.setup()
    assert (code, calls) == (2, []) and output.count("\n") == 1 and "clone the repository into a folder" in output


def test_a_home_that_may_not_be_written_to_needs_no_cache(checkout: Checkout) -> None:
    """pip fails on a wheel that it has to build, if it can't make its cache."""
    assert "cache: kept" in checkout.setup()[2]
    shutil.rmtree(checkout.folder / ".venv")
    assert "cache: 1" in checkout.setup(HOME="/dev/null/home")[2]


@pytest.mark.parametrize("name", ["a folder with spaces", "größer", "long" * 30])
def test_a_package_s_script_starts_from_any_folder(tmp_path: Path, name: str) -> None:
    """DeepSpeed's launcher is such a script, which pip gives the interpreter's bare path."""
    (tmp_path / name).mkdir()
    checkout = Checkout(tmp_path / name)
    assert checkout.setup()[0] == 0
    python, launcher = checkout.folder / ".venv" / "bin" / "python", checkout.folder / ".venv" / "bin" / "launcher"
    python.unlink()
    python.symlink_to(sys.executable)
    launcher.write_text(launcher.read_text() + "import sys\nprint(name, sys.argv[1:])\n")
    done = subprocess.run([launcher, "two words"], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("launcher ['two words']\n", "")


def test_make_lists_its_targets() -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    done = subprocess.run(["make"], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, env={**os.environ})
    assert done.returncode == 0
    assert all(f"make {target}" in done.stdout for target in ("demo", "test", "unit", "lint", "clean"))
