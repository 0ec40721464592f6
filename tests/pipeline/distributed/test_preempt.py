"""Signals, before training and in it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.distributed import preempt
from pipeline.distributed.preempt import Stopped, StopRequest

REPOSITORY = Path(__file__).resolve().parents[3]
FIRST_CTRL_C = "SIGINT: stopping after this step; Ctrl-C again ends it at once, without saving\n"
SECOND_CTRL_C = "SIGINT again: ended without saving; the same command goes on\n"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_signals_become_a_request(name: str) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        stop = StopRequest().listen()
        assert not stop.requested
        os.kill(os.getpid(), getattr(signal, name))
        assert stop.requested and stop.signal_name == name
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start(program: str) -> subprocess.Popen:
    """A program that has printed that it is ready."""
    text = f"from pipeline.distributed import preempt\n{program}"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, "-u", "-c", text], cwd=REPOSITORY, **pipes)
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


def end_of(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code, and what came on stderr."""
    try:
        return process.wait(timeout=60), process.stderr.read()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def test_second_ctrl_c_ends_at_once() -> None:
    process = start("preempt.StopRequest().listen()\nprint('ready')\nimport time\nwhile True: time.sleep(60)")
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == FIRST_CTRL_C
    process.send_signal(signal.SIGINT)
    assert end_of(process) == (130, SECOND_CTRL_C)


def test_a_signal_to_a_process_that_is_being_forked_is_not_the_parents() -> None:
    """Launchers signal a whole group: a loader process that is just starting must not make it look like two."""
    program = (
        "import os, signal, sys, time\n"
        "os.register_at_fork(after_in_child=lambda: time.sleep(1))\n"  # before the hook of the request
        "stop = preempt.StopRequest().listen()\nprint('ready')\nchild = os.fork()\n"
        "if child == 0: os._exit(7)\n"
        "time.sleep(0.3)\nos.kill(child, signal.SIGINT)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7 and not stop.requested"
    )
    assert end_of(start(program)) == (0, "")


def test_before_the_first_step_a_signal_raises_at_once_and_once() -> None:
    stop = StopRequest()
    before = [signal.getsignal(number) for number in preempt.SIGNALS]
    try:
        stop.listen(at_once=True)
        with pytest.raises(Stopped, match="by SIGTERM before the first step"):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # the end is on its way
        stop.poll_from_here()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.signal_name == "SIGUSR1"
    finally:
        stop.close()
    assert [signal.getsignal(number) for number in preempt.SIGNALS] == before


def test_signals_change_nothing_once_the_process_is_about_to_end() -> None:
    stop = StopRequest()
    try:
        stop.listen(at_once=True).ignore()
        os.kill(os.getpid(), signal.SIGTERM)
        assert not stop.requested
    finally:
        stop.close()


def test_a_failure_handler_of_a_library_does_not_swallow_it() -> None:
    assert not issubclass(Stopped, Exception)


def test_a_main_thread_inside_a_library_is_ended_by_a_thread() -> None:
    """It waits for a lock that it holds itself, in the C library, where no handler of Python's can run."""
    program = (
        "import ctypes, threading, time\npreempt.UNWIND_SECONDS = 0.1\npreempt.StopRequest().listen(at_once=True)\n"
        "mutex = ctypes.create_string_buffer(128)\nwaits_for = hex(ctypes.addressof(mutex))\n"
        "def tell():\n"
        "    while waits_for not in open(f'/proc/self/task/{threading.main_thread().native_id}/syscall').read():\n"
        "        time.sleep(0.01)\n"
        "    print('ready')\n"
        "threading.Thread(target=tell, daemon=True).start()\n"
        "while True: ctypes.CDLL(None).pthread_mutex_lock(mutex)"
    )
    process = start(program)
    process.send_signal(signal.SIGTERM)
    assert end_of(process) == (75, "error: told to stop by SIGTERM before the first step: nothing to save\n")


def test_the_training_program_listens_from_its_first_line_on(tmp_path: Path) -> None:
    """Here the import of a library that the command line needs never ends."""
    (tmp_path / "jsonargparse.py").write_text("print('ready')\nimport time\nwhile True: time.sleep(60)")
    command = [sys.executable, "-u", str(REPOSITORY / "pipeline" / "train.py")]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes)
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    process.send_signal(signal.SIGTERM)
    assert end_of(process) == (75, "error: told to stop by SIGTERM before the first step: nothing to save\n")


def test_the_training_program_listens_before_it_imports_anything_large() -> None:
    """A signal that comes while torch is imported ends it with 75; here torch never comes."""
    program = (
        "import sys, builtins, os, signal\nfrom pipeline import train\nreal = builtins.__import__\n"
        "def slow(name, *rest, **more):\n"
        "    if name == 'torch': os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return real(name, *rest, **more)\n"
        "assert 'torch' not in sys.modules\nbuiltins.__import__ = slow\ntrain.check_prepared = lambda launch: None\n"
        "print('ready')\nsys.exit(train.main(['--recipe', 'demo']))"
    )
    assert end_of(start(program)) == (75, "error: told to stop by SIGTERM before the first step: nothing to save\n")
