"""Incidents end to end: a bad batch is skipped, recorded and replayed; past the quota the run rewinds and skips it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint.files import (
    KINDS,
    PartWriter,
    Piece,
    checkpoint_path,
    newest_valid,
    publish,
    weights_hash,
)
from pipeline.checkpoint.reading import Reader
from pipeline.checkpoint.restore import load_weights, read_state
from pipeline.config.command_line import parse_command_line
from pipeline.data.tokenizer import load_tokenizer
from pipeline.distributed.connecting import Ranks
from pipeline.distributed.preempt import StopRequest
from pipeline.distributed.ranks import Agreement
from pipeline.finetuning.table import task_of
from pipeline.incidents.records import read_incident
from pipeline.incidents.rewind import SkippedBatches
from pipeline.recording.run_log import read_log
from pipeline.replay import main as replay_main
from pipeline.training import bad_steps
from pipeline.training.loop import train as loop
from pipeline.training.session import resolve_ds_config, set_up
from tests.forked_ranks import run_ranks
from tests.pipeline.data.test_reader import records, write_split
from tests.pipeline.data.test_tokenizer import write_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
SAMPLES, BATCH, STEPS = 40, 8, 9
BAD = [2, 6]  # the steps that hold the poisoned sample: once in each epoch of 5 steps
POISON = 17  # this sample's caption alone is long enough to read the planted row
PLANTED, PLANTED_ROW = "net.embedding.position", 30


def options(output: Path, *more: str) -> list[str]:
    settings = {
        "recipe": "flm_tiny",
        "data": output.parent / "data",
        "output": output,
        "data.eval_split": "null",
        "data.shuffle": "full",
        "objective.negative_share": 0,
        "optim.batch_size": BATCH,
        "optim.micro_batch_size": 2,
        "train.steps": STEPS,
        "train.save_every": 0,
        "train.log_every": 1,
        "tracking.tensorboard": "false",
        "tracking.report": "false",
        "tracking.sample_keys": "true",
    }
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))] + list(more)


def train(place, arguments: list[str], break_at: str | None = None) -> int:
    """The training program's run, as one of several ranks; ``break_at`` names what of bad_steps dies when called."""
    if break_at is not None:
        setattr(bad_steps, break_at, lambda *_: os._exit(9))
    launch = parse_command_line(arguments)
    device = torch.device("cpu")
    ranks = Ranks(place, device, Agreement(), StopRequest().listen())
    session = set_up(launch, resolve_ds_config(launch, place, device), task_of(launch.config), ranks)
    return loop(session)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, and a run stopped after step 2 in whose checkpoint one weight was made NaN."""
    work = tmp_path_factory.mktemp("work")
    rows = records(SAMPLES)
    rows[POISON] = dataclasses.replace(rows[POISON], captions=(" ".join("caption of picture" for _ in range(15)),))
    write_split(work / "data" / "toy" / "train", rows)
    load_tokenizer(write_tokenizer(work / "data" / "tokenizer"))  # imports what every fork then has
    assert run_ranks(2, train, options(work / "run", "--train.steps", "2", "--optim.schedule", "constant")) == [0, 0]
    plant(checkpoint_path(work / "run", 2))
    return work


def plant(checkpoint: Path) -> None:
    """Write the checkpoint anew, whole and valid, with a row of the position table that is not a number."""
    state = dataclasses.asdict(read_state(checkpoint))
    beside = checkpoint.with_name("planted")
    beside.mkdir()
    writer, planted = PartWriter(beside, 0), False
    reader = Reader(checkpoint)
    for name in reader.shapes("weight"):
        tensors = {kind: reader.read(kind, name) for kind in KINDS if name in reader.shapes(kind)}
        if name == f"{PLANTED}.weight":
            tensors["weight"][PLANTED_ROW] = math.nan
        writer.add(Piece(name, 0, reader.shapes("weight")[name], tensors))
        planted = planted or name == f"{PLANTED}.weight"
    assert planted
    files = writer.finish()
    shutil.rmtree(checkpoint)
    publish(beside, checkpoint, state, files)


def copy_run(work: Path, name: str, passed_by: list[int] | None = None) -> Path:
    run = work / name
    shutil.copytree(work / "run", run)
    if passed_by is not None:
        SkippedBatches(steps=passed_by).write(run)
    return run


def losses(run: Path) -> dict[int, float]:
    """Of the steps that were taken."""
    found = {record["step"]: record["loss"] for record in read_log(run / "log.jsonl") if record["kind"] == "train"}
    return {step: loss for step, loss in found.items() if not math.isnan(loss)}


def bad_steps_of(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (run / "incidents").glob("step_*"))


def final_hash(run: Path) -> str:
    found, _ = newest_valid(run)
    assert found == checkpoint_path(run, STEPS)
    return weights_hash(load_weights(found))


def replay(capfd, *arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of pipeline.replay."""
    capfd.readouterr()
    code = replay_main([str(one) for one in arguments])
    return code, *capfd.readouterr()


@pytest.mark.slow
def test_a_poisoned_batch_is_skipped_named_and_replayable(planted: Path) -> None:
    run = copy_run(planted, "poisoned")
    stage = ["--deepspeed", str(REPOSITORY / "ds_configs" / "zero2.json"), "--optim.schedule", "constant"]
    assert run_ranks(2, train, options(run, *stage)) == [0, 0]
    bad = bad_steps_of(run)
    assert bad == BAD
    around = copy_run(planted, "around", bad)
    assert run_ranks(2, train, options(around, *stage)) == [0, 0]
    assert losses(run) == losses(around) and len(losses(run)) == STEPS - len(BAD)
    assert final_hash(run) == final_hash(around)
    assert not (around / "incidents").exists()
    keys = {json.loads(line)["step"] for line in (around / "sample_keys-rank0.jsonl").read_text().splitlines()}
    assert keys == {step + 1 for step in range(STEPS) if step not in bad}  # those batches were not even read

    incident = read_incident(run / "incidents" / f"step_{bad[0]:08d}")
    assert "not finite" in incident["reason"] and incident["checkpoint"] == f"step_{bad[0] + 1:08d}"
    assert [row["slot"] for row in incident["micro_batches"]] == [0, 1, 2, 3]
    [row] = [row for row in incident["micro_batches"] if any(map(math.isnan, row["losses"].values()))]
    assert f"k{POISON:04d}" in row["keys"]
    told = [record for record in read_log(run / "log.jsonl") if record["kind"] == "incident"]
    assert [record["step"] for record in told] == [step + 1 for step in bad]

    command = [sys.executable, "-m", "pipeline.replay", str(run / "incidents" / f"step_{bad[0]:08d}")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "losses: bit-equal to the record" in done.stdout and done.stdout.rstrip().endswith("reproduced")
    first = done.stdout.splitlines()[3]
    assert f"slot {row['slot']} " in first and "loss nan, recorded nan" in first and f"k{POISON:04d}" in first
    assert f"whose output is not finite: {PLANTED}" in done.stdout


@pytest.mark.slow
def test_replay_of_one_sample_and_of_what_is_missing(planted: Path, rewound: Path, capfd, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(rewound, run)
    incident, second = (run / "incidents" / f"step_{step:08d}" for step in BAD)
    code, out, err = replay(capfd, incident, "--sample", f"k{POISON:04d}")
    assert code == 0 and "nan a target" in out and PLANTED in out, err
    for arguments, expected in [
        ([incident, "--sample", "nobody"], "no such sample in this step"),
        ([second], "--guard.save_incident_every 1"),
        ([incident, "--data", str(tmp_path / "gone")], "gone"),
        ([tmp_path], "no such file; expected a folder RUN/incidents/step_N"),
    ]:
        code, _, err = replay(capfd, *arguments)
        assert code == 2 and expected in err and err.count("\n") == 1, err
    weights = next((run / "checkpoints" / read_incident(incident)["checkpoint"]).glob("weight-*"))
    weights.write_bytes(weights.read_bytes()[:-1])
    code, _, err = replay(capfd, incident)
    assert code == 2 and weights.name in err and err.count("\n") == 1
    file = incident / "incident.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in content.items() if name != "counts"}))
    code, _, err = replay(capfd, incident)
    assert code == 2 and "has no entry 'counts'" in err


QUOTA = ["--guard.max_skips", "1", "--guard.go_around_before", "0", "--optim.schedule", "constant"]


@pytest.fixture(scope="module")
def rewound(planted: Path) -> Path:
    """A run that met its second bad step, went back to before the first, and around all in between."""
    run = copy_run(planted, "rewound")
    assert run_ranks(2, train, options(run, *QUOTA, "--data.num_workers", "1")) == [0, 0]
    return run


@pytest.mark.slow
def test_past_the_quota_the_run_goes_back_and_around(planted: Path, rewound: Path, capfd) -> None:
    around = copy_run(planted, "goes_around", list(range(BAD[0], BAD[1] + 1)))
    assert run_ranks(2, train, options(around, *QUOTA)) == [0, 0]
    assert losses(rewound) == losses(around) and min(losses(rewound)) == 1
    assert final_hash(rewound) == final_hash(around)
    remembered = SkippedBatches.read(rewound)
    assert remembered.steps == list(range(BAD[0], BAD[1] + 1)) and remembered.setting_aside is None
    assert remembered.rewinds == [{"from_step": BAD[1] + 1, "to_step": 2, "bad_steps": BAD[:2]}]
    [record] = [record for record in read_log(rewound / "log.jsonl") if record["kind"] == "rewind"]
    assert (record["step"], record["from_step"]) == (2, BAD[1] + 1)
    incident = read_incident(rewound / "incidents" / f"step_{BAD[0]:08d}")
    assert incident["checkpoint"] == f"before_rewind_1/step_{BAD[0] + 1:08d}"  # set aside, and still replayable
    code, out, err = replay(capfd, rewound / "incidents" / f"step_{BAD[0]:08d}")
    assert code == 0, out + err


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["finish_setting_aside", "_stand_at"])
def test_a_kill_during_a_rewind_loses_nothing(planted: Path, rewound: Path, moment: str) -> None:
    run = copy_run(planted, f"killed_at{moment}")
    with pytest.raises((EOFError, RuntimeError, ConnectionError)):
        run_ranks(2, train, options(run, *QUOTA), moment)
    remembered = SkippedBatches.read(run)
    assert len(remembered.rewinds) == 1 and (remembered.setting_aside is None) == (moment == "_stand_at")
    assert run_ranks(2, train, options(run, *QUOTA)) == [0, 0]
    assert SkippedBatches.read(run) == SkippedBatches.read(rewound)
    assert losses(run) == losses(rewound) and final_hash(run) == final_hash(rewound)
    states = [read_state(checkpoint_path(one, STEPS)) for one in (run, rewound)]
    assert states[0].guard == states[1].guard and states[0].passed_by == states[1].passed_by != []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "reason"),
    [("guard.action=stop", "guard.action is stop"), ("guard.max_rewinds=0", "gone back 0 times (guard.max_rewinds 0)")],
)
def test_a_run_that_may_not_go_back_stops_with_the_list(planted: Path, setting: str, reason: str, capfd) -> None:
    """Once as users start it, once in a fork, which is quicker."""
    run = copy_run(planted, setting.replace("=", "_"))
    arguments = options(run, *QUOTA, f"--{setting}")
    if "stop" in setting:
        command = [sys.executable, str(REPOSITORY / "pipeline" / "train.py"), *arguments]
        done = subprocess.run(command, cwd=planted, capture_output=True, text=True, timeout=100)
        code, told = done.returncode, done.stderr
    else:
        [code], told = run_ranks(1, train, arguments), capfd.readouterr().err
    assert code == 2 and "Traceback" not in told, told
    assert "guard: step 2 skipped: the loss is not finite (nan); python -m pipeline.replay" in told
    assert f"2 bad steps within 200 (guard.max_skips 1), and {reason}" in told.replace("the run has ", "")
    assert "holds step_00000002, step_00000006" in told
    assert not (run / "passed_by.json").exists()
