"""An evaluation killed anywhere goes on to the same scorecard, on any number of ranks, as one that nobody disturbed."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from pathlib import Path

import pytest

from pipeline.tasks import evaluation
from tests.pipeline.scoring.program import ITEMS, die_after, make_runs, results, start
from tests.toy_task import ToyTask


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def undisturbed(runs: Path) -> dict[str, dict]:
    """What one rank finds, for each task."""
    found = {}
    for name in ("toy", "run"):
        output = runs / "undisturbed" / name
        job = start(1, runs, name, output)
        assert job.finish() == [0], job.output(0)
        found[name] = results(output)
    return found


@pytest.mark.slow(10)
def test_a_scorecard_says_what_was_measured_and_how(runs: Path, undisturbed: dict[str, dict]) -> None:
    card = undisturbed["toy"]["card"]
    assert card["items"] == ITEMS and card["split"] == "dev" and card["corpora"] == ["synth_pairs"]
    assert card["checkpoint"]["step"] == 1 and len(card["checkpoint"]["sha256"]) == 64
    assert len(card["data_fingerprint"]) == 64 and card["data"]["synth_pairs/0"]["rows"] == 12
    assert card["batch_size"] == 3 and card["versions"]["torch"] and card["unusable"] == {"items": 0, "named": []}
    lines = [json.loads(line) for line in undisturbed["toy"]["predictions"].splitlines()]
    assert [line["position"] for line in lines] == list(range(ITEMS))
    assert undisturbed["toy"]["names"] == [
        "evaluation.json",
        "lock.json",
        "predictions.jsonl",
        "scorecard.json",
        "shares.json",
    ]
    assert "shuffled/flm_loss" in undisturbed["run"]["card"]["metrics"] and undisturbed["run"]["predictions"] == ""


@pytest.mark.slow(20)
@pytest.mark.parametrize("name", ["toy", "run"])
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_find_what_one_finds(
    runs: Path, tmp_path: Path, undisturbed: dict[str, dict], name: str, world: int
) -> None:
    job = start(world, runs, name, tmp_path)
    assert job.finish() == [0] * world, job.output(0)
    assert results(tmp_path) == undisturbed[name]


@pytest.mark.slow(20)
@pytest.mark.parametrize("half_a_line", [False, True])
def test_killed_after_every_batch_it_goes_on(
    runs: Path, tmp_path: Path, undisturbed: dict[str, dict], half_a_line: bool
) -> None:
    """One process after the other, each killed when it has written down one batch more; two passes of four batches."""
    starts = 0
    while (job := start(1, runs, "run", tmp_path, partial(die_after, 1, half_a_line))).finish() != [0]:
        starts += 1
        assert starts < 9, job.output(0)
    assert starts == 7  # the eighth has the last batch to do, and is not killed by it
    assert results(tmp_path) == undisturbed["run"]
    assert "items are done" in job.output(0) and ("lines were cut off" in job.output(0)) == half_a_line


@pytest.mark.slow(30)
@pytest.mark.parametrize(("first", "then"), [(1, 2), (4, 2)])
def test_another_number_of_ranks_goes_on(
    runs: Path, tmp_path: Path, undisturbed: dict[str, dict], first: int, then: int
) -> None:
    """All ranks of a job end when one is killed, with the code that asks to be started again."""
    job = start(first, runs, "run", tmp_path, partial(die_after, 1, True))
    codes = job.finish()
    assert -signal.SIGKILL in codes and set(codes) <= {-signal.SIGKILL, 75}, job.output(0)
    job = start(then, runs, "run", tmp_path)
    assert job.finish() == [0] * then, job.output(0)
    assert results(tmp_path) == undisturbed["run"]


@pytest.mark.slow(10)
def test_what_was_begun_with_other_items_is_left_alone(
    runs: Path, tmp_path: Path, undisturbed: dict[str, dict]
) -> None:
    """Positions in its journal may mean others: an earlier program judged each text of an image by itself."""
    assert start(1, runs, "run", tmp_path, partial(die_after, 1, False)).finish() != [0]
    [begun] = tmp_path.glob("*/evaluation.json")
    identity = json.loads(begun.read_text())
    assert identity["items"] == [ITEMS, ITEMS]
    begun.write_text(json.dumps(identity | {"items": [ITEMS, 5 * ITEMS]}))
    job = start(1, runs, "run", tmp_path)
    assert job.finish() == [0] and "items are done" not in job.output(0)
    [card] = tmp_path.glob("*/scorecard.json")
    assert card.parent != begun.parent
    assert json.loads(card.read_text())["metrics"] == undisturbed["run"]["card"]["metrics"]


def stop_rank(which: int, rank: int) -> None:
    """SIGTERM to one rank, in the middle of its first batch."""
    measure, told = evaluation.as_numbers, []

    def measured(records: list) -> list:
        if rank == which and not told:
            told.append(os.kill(os.getpid(), signal.SIGTERM))
        return measure(records)

    evaluation.as_numbers = measured
    from pipeline.scoring import journal

    journal.as_numbers = measured


@pytest.mark.slow(20)
@pytest.mark.parametrize(("world", "which"), [(1, 0), (2, 1)])
def test_told_to_stop_it_ends_with_75_and_goes_on(
    runs: Path, tmp_path: Path, undisturbed: dict[str, dict], world: int, which: int
) -> None:
    job = start(world, runs, "toy", tmp_path, partial(stop_rank, which))
    assert job.finish() == [75] * world, job.output(0)
    assert "the same command goes on from there" in job.output(0) and not list(tmp_path.glob("*/scorecard.json"))
    assert list(tmp_path.glob("*/parts/rank-*.jsonl"))
    job = start(1, runs, "toy", tmp_path)
    assert job.finish() == [0], job.output(0)
    assert results(tmp_path) == undisturbed["toy"]


def fail_on(which: int, rank: int) -> None:
    def measure(objective, batch):
        raise ValueError("a bug of the task")

    def passes(self, *arguments):
        return [one.__class__(**{**vars(one), "measure": measure}) for one in whole(self, *arguments)]

    if rank == which:
        whole, ToyTask.passes = ToyTask.passes, passes


@pytest.mark.slow(20)
@pytest.mark.parametrize(("world", "which"), [(1, 0), (2, 1)])
def test_a_bug_ends_all_ranks_with_a_traceback(runs: Path, tmp_path: Path, world: int, which: int) -> None:
    job = start(world, runs, "toy", tmp_path, partial(fail_on, which))
    assert job.finish() == [1] * world
    said = "".join(job.output(rank) for rank in range(world))
    assert "ValueError: a bug of the task" in said and "Traceback" in said
