"""The training program as users start it: bare, resumed, told to stop, on broken data, on two ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.checkpoint.files import newest_valid, weights_hash
from pipeline.checkpoint.restore import load_weights
from pipeline.recording.run_log import read_log
from pipeline.recording.sample_keys import read_sample_keys
from tests.forked_command import finish
from tests.forked_program import start_program
from tests.tiny_corpus import make_corpus

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN = [sys.executable, str(REPOSITORY / "pipeline" / "train.py")]
SHORT = ["--recipe", "flm_tiny", "--train.log_every", "1", "--tracking.tensorboard", "false"]
SHORT += ["--tracking.report", "false"]


def program(*arguments: str | Path) -> list[str]:
    return [*TRAIN, *map(str, arguments)]


def losses(run: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_log(run / "log.jsonl") if record["kind"] == "train"}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prepared data, as the bare command line finds it."""
    folder = tmp_path_factory.mktemp("work")
    make_corpus(folder / "data", train=120, dev=24)
    return folder


def test_nothing_prepared_is_one_line_naming_the_command(tmp_path: Path) -> None:
    """Invariant 9."""
    done = subprocess.run(program(), cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "python -m data_prep synth && python -m data_prep tokenizer" in done.stderr


@pytest.mark.parametrize(
    ("local_rank", "line"), [("0", "error: rank 1 on {}: command line: unknown option --optim.lrr"), ("1", "")]
)
def test_a_misspelt_option_is_said_once_a_node(tmp_path: Path, local_rank: str, line: str) -> None:
    environment = os.environ | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": local_rank}
    done = subprocess.run(
        program(f"--local_rank={local_rank}", "--optim.lrr", "1"),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", bool(line))
    assert done.stderr.startswith(line.format(socket.gethostname()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--optim.batch_size", "256"], "the training data has 120 samples, fewer than one batch"),
        (["--optim.batch_size", "6"], "use --optim.micro_batch_size 3"),
        (["--train.precision", "fp16"], "fp16 cannot train on a CPU"),
        (["--data", "data", "data/synth"], "twice"),
        (["--data.tokenizer", "./nowhere"], "no such folder"),
        (["--model.text.heads", "5"], "heads"),
    ],
)
def test_mistakes_end_before_training(work: Path, arguments: list[str], expected: str) -> None:
    done = finish(program(*SHORT, "--output", "runs/never", *arguments), work)
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr and "Traceback" not in done.stderr
    assert not (work / "runs" / "never").exists()


@pytest.mark.slow(35)
def test_resumed_program_equals_the_uninterrupted_one(work: Path) -> None:
    """Invariant 2: stopped by a signal, continued, and the log, the weights and the evaluation are the same."""
    options = [*SHORT, "--train.steps", "8", "--train.eval_every", "0", "--train.save_every", "0"]
    whole = finish(program(*options, "--tracking.report", "true", "--output", "runs/whole"), work)
    assert whole.returncode == 0, whole.stderr

    log = work / "runs" / "parts" / "log.jsonl"
    first = subprocess.Popen(
        program(*options, "--data.num_workers", "1", "--output", "runs/parts"),
        cwd=work,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 80
        while not (log.exists() and '"kind": "train"' in log.read_text()):
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(first.pid, signal.SIGTERM)  # as schedulers do: the loader's processes get it too
        assert first.wait(timeout=60) == 75, first.stderr.read()
    finally:
        first.kill()
        first.wait()
    saved, _ = newest_valid(work / "runs" / "parts")
    assert saved is not None and 0 < json.loads((saved / "state.json").read_text())["step"] < 8

    second = finish(program(*options, "--output", "runs/parts"), work)
    assert second.returncode == 0, second.stderr
    assert "continuing after step" in second.stdout
    assert losses(work / "runs" / "parts") == losses(work / "runs" / "whole")
    hashes = {weights_hash(load_weights(work / "runs" / name)) for name in ("whole", "parts")}
    assert len(hashes) == 1

    run = work / "runs" / "whole"
    for name in ("config.yaml", "ds_config.json", "environment.json", "report.html", "tokenizer/tokenizer.json"):
        assert (run / name).is_file(), name
    evaluations = [record for record in read_log(run / "log.jsonl") if record["kind"] == "eval"]
    assert [record["step"] for record in evaluations] == [0, 8]
    evaluate = [sys.executable, "-m", "pipeline.evaluate", "--run", str(run), "--data", str(work / "data")]
    found = finish(evaluate, REPOSITORY)
    assert found.returncode == 0, found.stderr
    for name, value in json.loads(found.stdout).items():
        assert value == pytest.approx(evaluations[-1][name], abs=1e-5), name

    other = finish(program(*options, "--output", "runs/whole", "--model.text.ffn_width", "96"), work)
    assert other.returncode == 2 and "ffn_width" in other.stderr, other.stderr


@pytest.mark.slow
def test_unusable_samples_are_named_and_stop_the_run(work: Path) -> None:
    """Invariant 8."""
    broken = work / "broken"
    shutil.copytree(work / "data", broken)
    tar = next((broken / "synth" / "train").glob("*.tar"))
    content = bytearray(tar.read_bytes())
    for index in range(0, len(content) - 4, 1):
        if content[index : index + 3] == b"\xff\xd8\xff" and index % 3 == 0:
            content[index : index + 3] = b"bad"
    tar.write_bytes(bytes(content))
    run = work / "runs" / "broken"
    options = [*SHORT, "--data", str(broken), "--output", str(run), "--data.bad_sample_share", "0"]
    done = finish(program(*options, "--data.bad_sample_budget", "3"), work)
    assert done.returncode == 2, done.stderr
    assert "too many unusable samples" in done.stderr and "not an image" in done.stderr
    assert "Traceback" not in done.stderr
    named = [json.loads(line) for line in (run / "unusable.jsonl").read_text().splitlines()]
    assert len(named) > 3 and all(row["reason"] == "not an image" and row["key"] for row in named)
    assert newest_valid(run)[0] is not None


@pytest.mark.slow(25)
def test_two_ranks_train_as_one_and_one_goes_on(work: Path) -> None:
    options = [
        *SHORT,
        "--data",
        str(work / "data"),
        "--train.steps",
        "3",
        "--train.eval_every",
        "0",
        "--model.text.dropout",
        "0",
    ]
    options += ["--tracking.sample_keys", "true"]
    stage = ["--deepspeed", REPOSITORY / "ds_configs" / "zero2.json"]
    two = start_program(2, [*options, *stage, "--output", work / "runs" / "two"], work / "two")
    assert two.finish() == [0, 0], two.output(0)
    one = finish(program(*options, "--output", "runs/one"), work)
    assert one.returncode == 0, one.stderr
    assert losses(work / "runs" / "two") == pytest.approx(losses(work / "runs" / "one"), abs=1e-4)
    evaluations = [
        [r for r in read_log(work / "runs" / n / "log.jsonl") if r["kind"] == "eval"] for n in ("one", "two")
    ]
    for first, second in zip(*evaluations, strict=True):
        assert first["flm_loss"] == pytest.approx(second["flm_loss"], abs=1e-4)
        assert first["shuffled/flm_accuracy"] == pytest.approx(second["shuffled/flm_accuracy"], abs=1e-4)
    continued = finish(program(*options, "--output", "runs/two", "--train.steps", "4"), work)
    assert continued.returncode == 0, continued.stderr
    assert max(losses(work / "runs" / "two")) == 4
    assert "1 ranks, ZeRO 1, micro-batches of 4 (was 2 ranks, ZeRO 2, micro-batches of 4)" in continued.stdout
    samples, other = (read_sample_keys(work / "runs" / name) for name in ("two", "one"))
    assert {step: samples[step] for step in other} == other
    assert list(samples) == [1, 2, 3, 4] and len({key for step in samples.values() for key in step}) == 4 * 16
