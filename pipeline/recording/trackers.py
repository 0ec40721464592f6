"""Sends the numbers of a run to TensorBoard and Weights & Biases, which may fail at any time and never end the run."""

from __future__ import annotations

import importlib.util
import os
import secrets
import sys
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from data_prep.manifest import write_atomically

WANDB_ID_NAME = "wandb_id.txt"  # a resumed run goes on in the same W&B run
FINISH_SECONDS = 60.0  # W&B waits for its uploads; without a network that has no end


class TrackerError(ValueError):
    """A tracker was asked for that is not installed."""


class Tracker(Protocol):
    """Where numbers go; any method may raise anything."""

    name: str

    def log(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def check_trackers(wandb: bool) -> None:
    """Raise TrackerError, before anything is built, for a tracker that was asked for and is not installed."""
    try:
        installed = importlib.util.find_spec("wandb") is not None
    except ValueError:  # a module without a spec: a stand-in
        installed = sys.modules.get("wandb") is not None
    if wandb and not installed:
        raise TrackerError(
            "Weights & Biases is not installed; run: pip install wandb==0.30.0, or leave out --tracking.wandb"
        )


class Trackers:
    """The trackers of a run; one that fails is left out from then on, with one warning."""

    def __init__(self, *makers: tuple[str, Callable[[], Tracker]]) -> None:
        self._trackers: list[Tracker] = []
        for name, make in makers:
            _works(name, partial(self._add, make))

    def _add(self, make: Callable[[], Tracker]) -> None:
        self._trackers.append(make())

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._trackers = [
            tracker for tracker in self._trackers if _works(tracker.name, partial(tracker.log, step, numbers))
        ]

    def close(self) -> None:
        for tracker in self._trackers:
            _works(tracker.name, tracker.close)
        self._trackers = []


def _works(name: str, function: Callable[[], Any]) -> bool:
    """Call ``function``; False, with a warning, where it fails."""
    try:
        function()
        return True
    except Exception as error:  # of a foreign library: whatever it is, training goes on
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"ALARM: no more numbers to {name}: {reason}", file=sys.stderr, flush=True)
        return False


class TensorBoardTracker:
    """Writes RUN/tensorboard; files are opened with the first numbers, past ``purge_step()`` others are dropped."""

    name = "TensorBoard"

    def __init__(self, output: Path, purge_step: Callable[[], int | None]) -> None:
        self._folder, self._purge_step = str(output / "tensorboard"), purge_step
        self._writer: Any = None

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self._folder, purge_step=self._purge_step(), flush_secs=30)
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a killed run loses nothing

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandbTracker:
    """A run at Weights & Biases, in RUN/wandb where WANDB_MODE is offline."""

    name = "Weights & Biases"

    def __init__(self, output: Path, config: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "openflm"),
            name=output.resolve().name,
            id=_run_id(output / WANDB_ID_NAME),
            resume="allow",
            dir=str(output),
            config=dict(config),
            settings=wandb.Settings(console="off"),  # the output of the ranks stays with their launcher
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({"step": step, **numbers})

    def close(self) -> None:
        errors: list[Exception] = []

        def finish() -> None:
            try:
                self._run.finish()
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=finish, daemon=True)
        thread.start()
        thread.join(FINISH_SECONDS)
        if thread.is_alive():
            raise TimeoutError(f"not done after {FINISH_SECONDS:.0f} s; send the rest by: wandb sync")
        if errors:
            raise errors[0]


def _run_id(file: Path) -> str:
    known = file.read_text().strip() if file.exists() else ""
    if not known:
        known = secrets.token_hex(4)
        write_atomically(file, known)
    return known
