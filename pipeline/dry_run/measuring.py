"""Measures a run by its first steps, with its own loader, engine and saver, in a folder that is removed afterwards."""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil
import time
from pathlib import Path

from pipeline.config.command_line import Launch
from pipeline.config.options import Config
from pipeline.distributed.endings import EXIT_DONE
from pipeline.dry_run.duration import Measured
from pipeline.dry_run.run_folder import nearest_folder
from pipeline.loading.open_data import loader_options
from pipeline.recording.run_log import LOG_NAME, read_log
from pipeline.training.loop import train
from pipeline.training.meter import peak_memory_bytes
from pipeline.training.session import Session

PREFIX = ".dry-run-"
LOADED_FOR_EACH = 4  # micro-batches of every loader process, after its first one, that its rate is told from


def short_launch(launch: Launch, steps: int) -> Launch:
    """The launch of the short training: as given, but for what would leave files, or ask a hub for weights.

    Its folder lies beside the run, on the disk whose saves are to be measured, and has the same name on every rank.
    """
    config = copy.deepcopy(launch.config)
    size = steps * config.optim.batch_size
    config.train.eval_samples = min(size, config.train.eval_samples or size)
    config.train.log_every = 1
    config.train.keep_best, config.train.patience = None, 0
    config.guard.save_incident_every = 0
    config.data.stage_dir = None
    tracking = config.tracking
    tracking.tensorboard = tracking.wandb = tracking.report = tracking.sample_keys = False
    for part in (config.model.vision, config.model.text):
        if part.pretrained == "auto":
            part.pretrained = None
    output = launch.output.absolute()
    folder = nearest_folder(output.parent) / f"{PREFIX}{output.name}"
    return dataclasses.replace(launch, config=config, output=folder)


def remove_folder(launch: Launch) -> None:
    """Remove what the short training, this one or one that was killed, has left."""
    assert launch.output.name.startswith(PREFIX), launch.output
    shutil.rmtree(launch.output, ignore_errors=True)


def measure(session: Session, steps: int, spent: float) -> tuple[int, Measured | None]:
    """Train ``steps`` steps, with an evaluation before and after and a save; every rank must call it.

    ``spent`` are seconds of this process in which it did what training does not. Returns the exit code of training, and
    on rank 0 what it took if that is 0.
    """
    start = max(_process_seconds() - spent, 0.0)
    config, accumulation = session.config, session.engine.accumulation
    short = copy.deepcopy(config)
    short.train.steps = min(steps, config.train.steps)
    short.train.eval_every = short.train.save_every = 0
    code = train(dataclasses.replace(session, config=short))
    loading = None
    if code == EXIT_DONE:
        loading = _loading_seconds(session, config, short.train.steps, accumulation)
    session.batches.close()
    peak = session.ranks.agreement.largest(peak_memory_bytes(session.engine.device))
    if code != EXIT_DONE or not session.ranks.place.is_main:
        return code, None
    return code, _read(session.records.output, start, loading, round(peak))


def _read(run: Path, start: float, loading: float | None, peak: int) -> Measured:
    """What the log of the short training says."""
    log = read_log(run / LOG_NAME)
    of_kind = lambda kind, name: tuple(one[name] for one in log if one["kind"] == kind)  # noqa: E731
    saves, stalls = of_kind("checkpoint", "seconds"), of_kind("checkpoint", "stall_seconds")
    return Measured(
        start=start,
        steps=of_kind("train", "step_seconds"),
        evaluations=of_kind("eval", "seconds"),
        save=saves[-1],
        save_stall=stalls[-1],
        loading=loading,
        peak_bytes=peak,
    )


def _loading_seconds(session: Session, config: Config, first_step: int, accumulation: int) -> float | None:
    """Seconds that the loaders of the slowest rank need for a step, with nothing beside them; None where this process
    loads, or where the run has too few steps to tell.

    A short training is served out of what was prepared before its first step, and would not show it.
    """
    workers = loader_options(config, pin=False).num_workers
    wanted = (LOADED_FOR_EACH + 1) * workers
    if not workers or (config.train.steps - first_step) * accumulation < wanted:
        return None
    session.ranks.agreement.wait()
    batches = session.batches.start(first_step)
    for _ in range(workers):
        next(batches)
    began = time.perf_counter()
    for _ in range(wanted - workers):
        next(batches)
    seconds = (time.perf_counter() - began) / (wanted - workers)
    return session.ranks.agreement.largest(seconds * accumulation)


def _process_seconds() -> float:
    """Seconds since this process began (proc(5), field 22 of stat), 0 where the system does not say."""
    try:
        began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
    return max(uptime - began / os.sysconf("SC_CLK_TCK"), 0.0)
