"""Damage met in training, on two ranks: skipped by all alike and named, or the end of the run in bounded time."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.data.order import SampleOrder
from tests.data_prep.test_images import with_scans
from tests.forked_program import Job, start_program
from tests.pipeline.data.test_reader import jpeg, meta, records, special, write_raw_split, write_split
from tests.pipeline.data.test_tokenizer import write_tokenizer
from tests.pipeline.data.test_transforms import png_header

SHARDS = 100  # of one sample each: more than a process keeps open, so that shards are opened all the time
BATCH = 16
OPTIONS = ["--recipe", "flm_tiny", "--train.log_every", "1", "--train.eval_every", "0", "--train.save_every", "0"]
OPTIONS += ["--tracking.tensorboard", "false", "--tracking.report", "false", "--data.num_workers", "1"]
OPTIONS += ["--optim.batch_size", BATCH, "--data.prefetch", "1"]
PAST_THE_BUDGET = 2
HOST = socket.gethostname()


def damaged_samples() -> list[tuple[str, dict]]:
    """(reason, members) of samples that are bad by themselves."""
    words = meta({"captions": ["a caption"]})
    return [
        ("wrong member", {"image": ("b.jpg", jpeg(1)), "meta": words}),
        ("bad key", {"image": ("../a.jpg", jpeg(2)), "meta": words}),
        ("not a regular file", {"image": special(b"2"), "meta": words}),
        ("too many pixels", {"image": ("a.png", png_header(60_000, 60_000)), "meta": words}),
        ("too many scans", {"image": ("a.jpg", with_scans("JPEG", 4000, 200)), "meta": words}),
        ("truncated image", {"image": ("a.jpg", jpeg(3)[:200]), "meta": words}),
    ]


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """data/good of 100 one-sample shards, data/bad of one shard whose samples are all bad, and a tokenizer."""
    data = tmp_path / "data"
    write_split(data / "good" / "train", records(SHARDS), samples_per_shard=1, corpus="good")
    write_raw_split(data / "bad" / "train", [members for _, members in damaged_samples()], corpus="bad")
    write_tokenizer(data / "tokenizer")
    return data


def start(data: Path, run: Path, steps: int, *more: object) -> Job:
    return start_program(
        2, [*OPTIONS, "--data", data, "--output", run, "--train.steps", steps, *more], run.parent / "out"
    )


def seen(steps: int) -> Counter[tuple[int, int]]:
    """How often each (corpus, row) comes in the first steps, whatever the number of ranks; bad is 0, good is 1."""
    order = SampleOrder([len(damaged_samples()), SHARDS], seed=2022)
    corpus, index, _ = order.at_many(range(steps * BATCH))
    return Counter(zip(corpus.tolist(), index.tolist()))


@pytest.mark.slow
def test_bad_samples_and_shards_are_skipped_and_named(prepared: Path, tmp_path: Path) -> None:
    """Invariant 8: every bad sample as often as its turn comes, every bad shard once with what it cost."""
    run, steps = tmp_path / "run", 24
    job = start(prepared, run, steps, "--data.bad_sample_budget", "1000")
    job.wait_for_step(run, 3)
    os.truncate(prepared / "good" / "train" / "00003.tar", 700)
    (prepared / "good" / "train" / "00005.tar").unlink()
    assert job.finish(200) == [0, 0], job.output(0) + job.output(1)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))

    times = seen(steps)
    named = Counter(json.loads(line)["reason"] for line in (run / "unusable.jsonl").read_text().splitlines())
    assert named == {reason: times[0, row] for row, (reason, _) in enumerate(damaged_samples())}
    shards = json.loads((run / "unusable_shards.json").read_text())
    assert {name: found["reason"] for name, found in shards.items()} == {
        "good/train/00003.tar": "truncated shard",
        "good/train/00005.tar": "missing shard",
    }
    for number in (3, 5):
        found = shards[f"good/train/{number:05d}.tar"]
        assert 1 <= found["samples"] <= times[1, number] and found["since_step"] >= 3
        assert job.output(0).count(f"good/train/{number:05d}.tar, since step {found['since_step']}") == 1
    assert lines[-1]["bad_samples"] == named.total() + sum(found["samples"] for found in shards.values())
    assert lines[-1]["bad_shards"] == 2


@pytest.mark.slow
def test_past_the_budget_the_run_stops_with_the_list(prepared: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = start(prepared, run, 1000, "--data.bad_sample_budget", "5", "--data.bad_sample_share", "0")
    assert job.finish(200) == [PAST_THE_BUDGET, PAST_THE_BUDGET], job.output(0) + job.output(1)
    (last,) = [line for line in job.output(0).splitlines() if line.startswith("error: ")]
    assert last.startswith("error: too many unusable samples: ") and "raise data.bad_sample_budget" in last
    named = [json.loads(line) for line in (run / "unusable.jsonl").read_text().splitlines()]
    assert len(named) > 5 and f"{named[-1]['key']} ({named[-1]['reason']})" in last


def kill_a_worker(job: Job, data: Path) -> None:
    os.kill(job.workers(1)[0], signal.SIGKILL)


def stop_a_worker(job: Job, data: Path) -> None:
    """It neither dies nor answers, as in a read that hangs."""
    os.kill(job.workers(1)[0], signal.SIGSTOP)


def take_the_folder_away(job: Job, data: Path) -> None:
    (data / "good" / "train").rename(data / "elsewhere")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("misfortune", "message"),
    [
        (kill_a_worker, f"error: rank 1 on {HOST}: a loader process died (DataLoader worker (pid"),
        (stop_a_worker, f"error: rank 1 on {HOST}: no batch within 4 s, while reading "),
        (take_the_folder_away, "good/train is gone: renamed, deleted or no longer mounted; bring it back and start"),
    ],
)
def test_what_cannot_be_skipped_ends_all_ranks_in_time(
    prepared: Path, tmp_path: Path, misfortune: Callable[[Job, Path], None], message: str
) -> None:
    """Within seconds, without a launcher that would end the other rank: it learns of it from the connection."""
    run = tmp_path / "run"
    patience = 30 if misfortune is take_the_folder_away else 4  # a folder that vanished is waited for first
    job = start(prepared, run, 100_000, "--data.bad_sample_budget", "1000000", "--data.timeout_seconds", patience)
    job.wait_for_step(run, 2)
    workers = job.workers(0) + job.workers(1)
    misfortune(job, prepared)
    assert job.finish(60) == [75, 75], job.output(0) + job.output(1)
    output = [job.output(0), job.output(1)]
    assert any(message in text for text in output), output
    assert "all ranks end with exit code 75" in job.output(0) or misfortune is take_the_folder_away, output
    assert "Traceback" not in "".join(output), output
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "loader processes outlive their rank"
        time.sleep(0.1)
