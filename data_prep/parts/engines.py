"""Runs the making of parts on an engine: processes of this machine, MPI, a job array, Spark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, wait
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_prep.downloading.lean_imports import leave_out_unused
from data_prep.held_signals import held_signals
from data_prep.parts.claims import Claims
from data_prep.parts.part import CLAIMED, PartOptions, make_part
from data_prep.parts.plan import Plan
from data_prep.parts.progress import State, Watch
from data_prep.record import PrepError

ENGINES = ("processes", "array", "mpi", "spark")
_AGAIN_SECONDS = 1.0  # between looks at parts that somebody else has claimed
_ROOT = str(Path(__file__).resolve().parents[2])


def make_parts(
    plan: Plan, options: PartOptions, watch: Watch, processes: int, array: tuple[int, int] | None = None
) -> State:
    """Make all parts by ``processes`` processes of this machine; what was made before stays.

    As number I of N of an array (I from 0) it takes the parts I, I + N, ... and then others; it ends when each part
    is made, has failed, or is seen to be worked on by others. Without ``array`` it waits for these too. Raises what
    ``Watch.check`` raises, and PrepError when a process dies.
    """
    first, count = array or (0, 1)
    task = {"folder": str(plan.folder.absolute()), "options": asdict(options), "first": first, "count": count}
    task["leave"] = array is not None
    try:
        with tempfile.TemporaryFile() as said, _workers(min(processes, plan.parts), task, said) as workers:
            return watch.wait(lambda: _ended(workers, said))
    finally:
        if plan.folder.is_dir():
            Claims(plan).clear_run(options.run)


@contextmanager
def _workers(processes: int, task: dict[str, Any], said: Any) -> Iterator[list[subprocess.Popen]]:
    """Processes that make parts, ended at the end. Each also ends when this process does: its input is a pipe."""
    search_path = os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH")]))
    workers: list[subprocess.Popen] = []
    try:
        for _ in range(processes):
            with held_signals():
                worker = subprocess.Popen(
                    [sys.executable, "-m", "data_prep.parts.worker", json.dumps(task)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=said,
                    env={**os.environ, "PYTHONPATH": search_path},
                    start_new_session=True,  # Ctrl-C reaches this process alone, which ends them
                )
                workers.append(worker)
        yield workers
    finally:
        with held_signals():
            for worker in workers:
                worker.kill()
            for worker in workers:
                worker.wait()
                worker.stdin.close()


def _ended(workers: list[subprocess.Popen], said: Any) -> bool:
    """Whether all processes have ended; raises PrepError for one that failed."""
    codes = [worker.poll() for worker in workers]
    for code in codes:
        if code not in (None, 0):
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines() or ["no message"]
            reason = (
                f"it was ended by signal {-code}: out of memory?" if code < 0 else lines[-1].removeprefix("error: ")
            )
            raise PrepError(f"a process that makes parts failed ({reason}); run the same command to resume")
    return None not in codes


class MpiPool:
    """The processes of one `mpirun`: number 0 drives, the others make parts."""

    def __init__(self) -> None:
        """Only number 0 comes back; the others end within, when it does."""
        import atexit

        from mpi4py import MPI  # starts MPI: only under this engine
        from mpi4py.futures import MPICommExecutor

        self._world, self._failed = MPI.COMM_WORLD, 0
        if self._world.Get_size() == 1:
            raise PrepError(
                "--engine mpi with one process, expected some: mpirun -n N python -m data_prep ... makes parts by N - 1"
            )
        if self._world.Get_rank() > 0:
            leave_out_unused()
        self._pool = MPICommExecutor(self._world, root=0)
        self.executor: Executor | None = self._pool.__enter__()
        if self.executor is None:
            self._pool.__exit__(None, None, None)
            raise SystemExit(0)
        atexit.register(self._end)  # the others wait for a word, whatever ends this process

    def give_up(self, code: int) -> None:
        """End all processes with this one, without waiting for their parts."""
        self._failed = code

    def _end(self) -> None:
        if self._failed:
            sys.stderr.flush()
            self._world.Abort(self._failed)
        self._pool.__exit__(None, None, None)


def make_by_mpi(plan: Plan, options: PartOptions, watch: Watch, pool: MpiPool) -> State:
    """Make all parts by the other processes of the pool."""
    assert pool.executor is not None
    try:
        while numbers := _left(plan):
            with held_signals():
                tasks = [pool.executor.submit(make_part, plan.folder, number, options) for number in numbers]
            watch.wait(lambda tasks=tasks: _all_done(tasks))
            if any(task.result() == CLAIMED for task in tasks):
                time.sleep(_AGAIN_SECONDS)
        return watch.look()
    except BaseException as error:
        pool.give_up(_exit_code(error))
        raise


def _all_done(tasks: list) -> bool:
    with held_signals():
        done, pending = wait(tasks, 0.0)
    for task in done:
        task.result()  # raises what it raised
    return not pending


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) and error.code else 1
    return 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 2)


def make_by_spark(plan: Plan, options: PartOptions, watch: Watch, processes: int) -> State:
    """Make all parts as tasks of the Spark cluster that spark-submit chose, or by ``processes`` processes here."""
    try:
        from pyspark import SparkConf, SparkContext
    except ImportError as error:
        raise PrepError("--engine spark needs PySpark, which is not installed; pip install '.[spark]'") from error
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH")]))
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    conf = (
        SparkConf()
        .set("spark.ui.enabled", "false")
        .set("spark.ui.showConsoleProgress", "false")
        .setAppName(f"data_prep {plan.recipe.corpus}")
    )
    if conf.get("spark.master") is None:  # neither spark-submit nor PYSPARK_SUBMIT_ARGS nor spark-defaults.conf has one
        conf.setMaster(f"local[{processes}]")
    context = SparkContext.getOrCreate(conf)
    context.setLogLevel("ERROR")
    try:
        folder = plan.folder.absolute()  # Spark's processes have a working directory of their own
        while numbers := _left(plan):
            found = context.parallelize(numbers, len(numbers))
            task = _SparkTask(folder, options)
            job = _Background(lambda found=found, task=task: found.map(task).collect())
            watch.wait(job.is_over)
            if CLAIMED in job.result:
                time.sleep(_AGAIN_SECONDS)
        return watch.look()
    finally:
        context.stop()


class _SparkTask:
    """Makes a part in a process of Spark; it is pickled."""

    def __init__(self, folder: Path, options: PartOptions) -> None:
        self._folder, self._options = folder, options

    def __call__(self, number: int) -> str:
        leave_out_unused()
        return make_part(self._folder, number, self._options)


class _Background:
    """A call in a thread."""

    def __init__(self, call: Callable[[], Any]) -> None:
        import threading

        self.result: Any = None
        self._error: Exception | None = None

        def run() -> None:
            try:
                self.result = call()
            except Exception as error:
                self._error = error

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def is_over(self) -> bool:
        if self._thread.is_alive():
            return False
        if self._error is not None:
            lines = [line for line in str(self._error).splitlines() if "Error: " in line] or [str(self._error)]
            raise PrepError(f"a task of Spark failed ({lines[0].strip()[:300]}); run the same command to resume")
        return True


def _left(plan: Plan) -> list[int]:
    """Parts that are not made and did not fail in this run."""
    return [number for number in range(plan.parts) if not plan.is_done(number) and not plan.failure(number).exists()]
