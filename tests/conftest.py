"""Test settings: few threads, no network trackers, slow tests last, the longest of them first."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

REPOSITORY = Path(__file__).resolve().parents[1]
SLOW_TIMEOUT_SECONDS = 420

for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "MPLBACKEND": "Agg",
    "TORCH_EXTENSIONS_DIR": str(REPOSITORY / ".cache" / "torch_extensions"),
}.items():
    os.environ.setdefault(_name, _value)

# Started by `&` in a script this process ignores SIGINT, and so would all programs that tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("openflm", deadline=None)  # a busy machine is no failure; pytest's own limit stands
settings.load_profile("openflm")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Processes of ``-n logical``: the cores that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs the slow tests after all others and gives them time, unless they ask for a limit of their own.

    ``slow(seconds)`` is about how long one takes on two cores: the longest begin first, so that no process is left with
    one of them at the end.
    """
    items.sort(key=_turn)
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_SECONDS))


def _turn(item: pytest.Item) -> tuple[bool, float]:
    mark = item.get_closest_marker("slow")
    return mark is not None, -mark.args[0] if mark and mark.args else 0.0


@pytest.fixture(autouse=True)
def _process_as_it_was() -> Iterator[None]:
    """A test that leaves this process elsewhere, or deaf to signals, fails itself instead of tests that follow it."""
    before = _place_and_handlers()
    yield
    assert _place_and_handlers() == before, "the test changed the working folder or a signal's handler"


def _place_and_handlers() -> tuple[str, ...]:
    return os.getcwd(), *(str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))
