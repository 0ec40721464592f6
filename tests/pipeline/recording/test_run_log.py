"""Tests of the run log and of the numbers it hands to TensorBoard."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.recording.run_log import LOG_NAME, SUPERSEDED_NAME, MetricsWriter, read_log


def writer(path: Path, **options) -> MetricsWriter:
    return MetricsWriter(path, {"seed": 1}, is_main=True, **{"tensorboard": False, **options})


def test_log_round_trip_keeps_what_json_cannot_say(tmp_path: Path) -> None:
    log = writer(tmp_path)
    values = {"loss": math.nan, "norm": math.inf, "low": -math.inf, "lr": np.float32(0.5), "n": 3, "gap": None}
    log.log(1, {**values, "tensor": torch.tensor(2.0)})
    log.log(1, {"loss": 0.25}, kind="eval")
    log.close()
    lines = (tmp_path / LOG_NAME).read_text().splitlines()
    assert len(lines) == 2 and all(json.loads(line, parse_constant=pytest.fail) for line in lines)  # strict JSON
    train, held_out = read_log(tmp_path / LOG_NAME)
    assert math.isnan(train["loss"]) and train["norm"] == math.inf and train["low"] == -math.inf
    assert (train["lr"], train["n"], train["gap"], train["tensor"]) == (0.5, 3, None, 2.0)
    assert (held_out["kind"], held_out["step"], held_out["loss"]) == ("eval", 1, 0.25)


def test_a_torn_last_line_is_tolerated_and_cut(tmp_path: Path) -> None:
    log = writer(tmp_path)
    log.log(1, {"loss": 1.0})
    log.close()
    with open(tmp_path / LOG_NAME, "a") as file:
        file.write('{"kind": "train", "step": 2, "lo')
    assert [record["step"] for record in read_log(tmp_path / LOG_NAME)] == [1]
    log = writer(tmp_path)
    log.log(2, {"loss": 2.0})
    log.close()
    assert [json.loads(line)["step"] for line in (tmp_path / LOG_NAME).read_text().splitlines()] == [1, 2]


def test_resume_moves_overtaken_records_aside(tmp_path: Path) -> None:
    log = writer(tmp_path)
    for step in range(1, 6):
        log.log(step, {"loss": float(step)})
    log.close()
    log = writer(tmp_path)
    assert log.resume_from(3) == 2
    log.log(4, {"loss": 40.0})
    log.close()
    assert [record["loss"] for record in read_log(tmp_path / LOG_NAME)] == [1.0, 2.0, 3.0, 40.0]
    assert [record["step"] for record in read_log(tmp_path / SUPERSEDED_NAME)] == [4, 5]


def test_reader_follows_a_run_that_went_back_without_saying_so(tmp_path: Path) -> None:
    log = writer(tmp_path)
    log.log(0, {"x": 0}, kind="eval")
    for step in (1, 2, 3):
        log.log(step, {"x": step})
    log.log(2, {"x": 20})
    log.close()
    assert [(r["kind"], r["x"]) for r in read_log(tmp_path / LOG_NAME)] == [("eval", 0), ("train", 1), ("train", 20)]


def test_missing_log_reads_as_empty(tmp_path: Path) -> None:
    assert read_log(tmp_path / "absent.jsonl") == []


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    log = MetricsWriter(run, {}, is_main=False, tensorboard=True, wandb=True)
    log.log(1, {"loss": 1.0})
    log.resume_from(0)
    log.close()
    assert not run.exists()


def test_tensorboard_holds_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = writer(tmp_path, tensorboard=True)
    log.log(1, {"loss": 0.5, "bad": math.nan, "note": "text"})
    log.log(2, {"loss": 0.25})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 0.5), (2, 0.25)]


def killed_while_logging(run: Path) -> None:
    log = writer(run, tensorboard=True)
    for step in (1, 2, 3):
        log.log(step, {"loss": float(step)})
    os.kill(os.getpid(), signal.SIGKILL)


def test_tensorboard_of_a_killed_run_loses_nothing_and_repeats_nothing(tmp_path: Path) -> None:
    """Killed after step 3, continued from step 2: step 3 is there once, with its new value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils import tensorboard  # noqa: F401  before the fork

    process = multiprocessing.get_context("fork").Process(target=killed_while_logging, args=(tmp_path,))
    process.start()
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL
    (events,) = (tmp_path / "tensorboard").iterdir()
    events.rename(events.with_name("events.out.tfevents.1000000000.earlier"))  # files are read in order of name
    log = writer(tmp_path, tensorboard=True)
    log.resume_from(2)
    log.log(3, {"loss": 30.0})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 30)]
