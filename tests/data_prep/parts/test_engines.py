"""Every engine, and every number of processes, makes the same split; what fails is said, tried again, added later."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.__main__ import main
from data_prep.checks.measure import measure_split
from data_prep.checks.verify import verify_split
from data_prep.filters import Limits
from data_prep.manifest import read_manifest
from data_prep.parts.engines import _Background, _ended
from data_prep.record import PrepError
from tests.data_prep.parts.image_server import ImageServer, arguments, files, image_server, mpirun, program, start

COUNT = 70
STATUS = {3: 404, 30: 503, 31: 429}


@pytest.fixture(scope="module")
def server() -> Iterator[ImageServer]:
    with image_server() as running:
        yield running


@pytest.fixture(scope="module")
def table(server: ImageServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return server.table(tmp_path_factory.mktemp("table") / "rows.tsv", COUNT)


@pytest.fixture(scope="module")
def expected(server: ImageServer, table: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The split as one process makes it."""
    server.status = dict(STATUS)
    folder = tmp_path_factory.mktemp("expected")
    assert main(arguments(table, folder / "web")) == 0
    manifest = read_manifest(folder / "web" / "train")
    assert manifest.rows == COUNT - 3 and manifest.rejected == {"http_404": 1, "http_429": 1, "http_503": 1}
    assert verify_split(folder / "web" / "train", Limits(), 1).problems == []
    return files(folder / "web" / "train")


@pytest.fixture(autouse=True)
def answers(server: ImageServer) -> None:
    server.status, server.seconds = dict(STATUS), 0.0
    server.asked.clear()


def finish(command: list[str], folder: Path, code: int = 0, **variables: str) -> str:
    log = folder / "log"
    process = start(command, log, **variables)
    try:
        assert process.wait(110) == code, log.read_text()
    finally:
        process.kill()
    return log.read_text()


@pytest.mark.slow
def test_processes_make_the_same_split_as_one(server, table, expected, tmp_path) -> None:
    assert main(arguments(table, tmp_path / "web", "--processes", "3")) == 0
    assert files(tmp_path / "web" / "train") == expected
    assert sorted(server.asked) == list(range(COUNT))  # each once
    assert sorted(os.listdir(tmp_path / "web")) == ["README.md", "train"]


@pytest.mark.slow
def test_mpi_makes_the_same_split(server, table, expected, tmp_path) -> None:
    if not mpirun(1):
        pytest.skip("mpirun is not installed")
    launcher = mpirun(3)
    words = arguments(table, tmp_path / "web", "--engine", "mpi")
    finish(program(words, *launcher), tmp_path)
    assert files(tmp_path / "web" / "train") == expected and sorted(server.asked) == list(range(COUNT))
    said = finish(program([*words, "--columns", "a,b"], *launcher), tmp_path, code=2)  # an error of the first ends all
    assert "already prepared" in said


@pytest.mark.slow
def test_mpi_ends_with_code_3_where_all_downloads_fail(server, table, tmp_path) -> None:
    if not mpirun(1):
        pytest.skip("mpirun is not installed")
    server.status = dict.fromkeys(range(COUNT), 404)
    launcher = mpirun(2)
    said = finish(program(arguments(table, tmp_path / "web", "--engine", "mpi"), *launcher), tmp_path, code=3)
    assert "4 of 4 parts failed" in said and "70 http_404" in said


@pytest.mark.slow
def test_tasks_of_an_array_make_the_same_split_and_the_last_seals_it(server, table, expected, tmp_path) -> None:
    server.seconds = 0.05
    tasks = []
    for number in range(2):
        words = arguments(table, tmp_path / "web", "--engine", "array")
        slurm = {"ID": str(3 + 2 * number), "COUNT": "2", "MIN": "3", "STEP": "2"}
        variables = {f"SLURM_ARRAY_TASK_{name}": value for name, value in slurm.items()}
        tasks.append(start(program(words), tmp_path / f"log{number}", **variables))
    try:
        assert [task.wait(110) for task in tasks] == [0, 0], [(tmp_path / f"log{n}").read_text() for n in range(2)]
    finally:
        for task in tasks:
            task.kill()
    assert files(tmp_path / "web" / "train") == expected
    assert sorted(server.asked) == list(range(COUNT))  # nothing twice
    server.asked.clear()
    late = finish(program(arguments(table, tmp_path / "web", "--engine", "array", "--array", "1/2")), tmp_path)
    assert "67 rows" in late and not server.asked  # a task that Slurm starts when all is over


@pytest.mark.slow
def test_spark_makes_the_same_split(server, table, expected, tmp_path) -> None:
    if importlib.util.find_spec("pyspark") is None:
        pytest.skip("PySpark is not installed: pip install '.[spark]'")
    if shutil.which("java") is None:
        pytest.skip("Java is not installed, which Spark needs")
    words = arguments(table, tmp_path / "web", "--engine", "spark", "--processes", "2")
    finish(program(words), tmp_path, SPARK_LOCAL_IP="127.0.0.1")
    assert files(tmp_path / "web" / "train") == expected and sorted(server.asked) == list(range(COUNT))


@pytest.mark.slow
def test_a_part_that_fails_is_tried_again_by_the_next_run_and_no_other(
    server, table, expected, tmp_path, capsys
) -> None:
    server.status |= dict.fromkeys(range(20, 40), 500)
    words = arguments(table, tmp_path / "web")
    assert main(words) == 3
    message = capsys.readouterr().err
    assert "1 of 4 parts failed (such as 1): only 0 of 20 URLs" in message and "20 http_500" in message
    assert message.count("\n") == 1 and not (tmp_path / "web" / "train").exists()
    server.status = dict(STATUS)
    server.asked.clear()
    assert main(words) == 0
    assert sorted(server.asked) == list(range(20, 40)) and files(tmp_path / "web" / "train") == expected


@pytest.mark.slow
def test_failed_urls_are_downloaded_again_later(server, table, expected, tmp_path, capsys) -> None:
    """On a finished split: only those that can have changed, as further shards."""
    words = arguments(table, tmp_path / "web")
    assert main([*words, "--retry-failed"]) == 2
    assert "no finished split" in capsys.readouterr().err
    assert main(words) == 0
    server.asked.clear()
    assert main([*words, "--retry-failed"]) == 3  # nothing has changed
    assert "only 0 of 2 URLs" in capsys.readouterr().err and files(tmp_path / "web" / "train") == expected
    server.status = {3: 404, 31: 429}
    server.asked.clear()
    assert main([*words, "--retry-failed"]) == 0
    assert sorted(server.asked) == [30, 31] and "1 rows more than before" in capsys.readouterr().out
    split = tmp_path / "web" / "train"
    manifest, now = read_manifest(split), files(split)
    assert manifest.rows == COUNT - 2 and manifest.rejected == {"http_404": 1, "http_429": 1}
    assert all(now[name] == content for name, content in expected.items() if name.endswith((".tar", ".npy")))
    assert verify_split(split, Limits(), 1).problems == []
    assert manifest.provenance["passport"] == measure_split(split, manifest, 1).as_json()
    server.status.clear()
    assert main([*words, "--retry-failed", "--min-side", "17"]) == 2
    assert "other options or files (min_side)" in capsys.readouterr().err
    assert main([*words, "--retry-failed"]) == 0 and read_manifest(split).rejected == {"http_404": 1}
    assert main([*words, "--retry-failed"]) == 0
    assert "no URL failed for a reason that can change" in capsys.readouterr().out
    manifest = read_manifest(split)
    assert manifest.provenance["passport"] == measure_split(split, manifest, 1).as_json()


@pytest.mark.slow
def test_a_dead_process_ends_the_run_with_one_line(server, table, tmp_path) -> None:
    """Killed for memory, say; what is published stays."""
    server.seconds = 0.5
    process = start(program(arguments(table, tmp_path / "web")), tmp_path / "log")
    try:
        deadline = time.monotonic() + 60
        while not server.asked:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        [child] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)
        assert process.wait(60) == 2
    finally:
        process.kill()
    assert "ended by signal 9: out of memory?" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_processes_end_with_the_one_that_started_them(server, table, tmp_path) -> None:
    """After SIGKILL nobody can tell them."""
    server.seconds = 0.5
    process = start(program(arguments(table, tmp_path / "web")), tmp_path / "log")
    deadline = time.monotonic() + 60
    while not server.asked:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    [child] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--engine", "array"], "--array I/N"),
        (["--engine", "array", "--array", "2/2"], "expected I/N"),
        (["--engine", "array", "--array", "0/2", "--overwrite"], "remove the split"),
        (["--engine", "mpi"], "mpirun -n N"),
        (["--engine", "dask"], "invalid choice"),
    ],
)
def test_engines_are_refused_in_one_line(tmp_path, capsys, monkeypatch, more: list[str], message: str) -> None:
    if more == ["--engine", "mpi"]:
        process = start(program(arguments(tmp_path / "x.tsv", tmp_path / "web", *more)), tmp_path / "log")
        assert process.wait(60) == 2 and message in (tmp_path / "log").read_text()
        return
    for name in ("ID", "COUNT", "MIN", "STEP"):
        monkeypatch.delenv(f"SLURM_ARRAY_TASK_{name}", raising=False)
    try:
        code = main(arguments(tmp_path / "x.tsv", tmp_path / "web", *more))
    except SystemExit as error:
        code = error.code
    said = capsys.readouterr().err
    assert code == 2 and message in said and said.count("\n") == 1


def test_an_error_of_a_task_of_spark_is_one_line() -> None:
    def fail() -> None:
        raise RuntimeError("Traceback\n  File x\nOSError: [Errno 28] No space left on device\n\tat java")

    job = _Background(fail)
    with pytest.raises(PrepError, match="^a task of Spark failed .OSError: .Errno 28. No space left on device.; run"):
        while not job.is_over():
            time.sleep(0.01)
    assert _ended([], None)
