"""A run continues on any other topology: same samples, bit-equal state, losses within 1e-5 of what they would be."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.proof.topology_matrix import compare, run_matrix, table
from pipeline.checkpoint import restore
from pipeline.checkpoint.saver import Saver
from pipeline.checkpoint.state import RunState
from tests.forked_ranks import run_ranks
from tests.pipeline.engine.test_engine import global_loss, make_engine, micro_batches, tiny_config


@pytest.mark.slow(60)
def test_saved_in_every_cell_and_continued_in_every_other(tmp_path: Path) -> None:
    """A part of the matrix; benchmarks/proof/topology_matrix.py runs all of it, and bf16."""
    result = compare(*run_matrix(tmp_path, "fp32", ranks=(1, 2, 4), stages=(0, 3)), tolerance=1e-5)
    assert result["faults"] == []
    assert sum(len(row) for row in result["largest_loss_difference"].values()) == 6 * 6
    assert len(table(result).splitlines()) == 2 + 6


def another_micro_batch(place, folder: Path) -> dict[int, list[float]]:
    """Losses of the same steps by micro-batch size, after a checkpoint written with micro-batches of 2."""
    found = {}
    for micro in (2, 1, 4):
        config = tiny_config(micro=micro)
        engine, agreement = make_engine(place, config, 2)
        if micro == 2:
            losses_of(place, config, engine, agreement, range(5))
            save(place, config, engine, agreement, folder, 5)
        else:
            assert restore.resume(folder, engine, agreement, place.is_main).step == 5
        found[micro] = losses_of(place, config, engine, agreement, range(5, 8))
    return found


def other_precisions(place, folder: Path) -> list[list[float]]:
    """Losses of a run whose parts of four steps are in fp32, bf16 and fp32, and of the same run in fp32 alone."""
    found = []
    for run, precision, start in (("a", "fp32", 0), ("a", "bf16", 4), ("a", "fp32", 8), ("b", "fp32", 0)):
        config = tiny_config(precision=precision)
        engine, agreement = make_engine(place, config, 2)
        assert (restore.resume(folder / run, engine, agreement, place.is_main) or RunState()).step == start
        stop = start + 4 if run == "a" else 12
        found.append(losses_of(place, config, engine, agreement, range(start, stop)))
        save(place, config, engine, agreement, folder / run, stop)
    return found


def save(place, config, engine, agreement, folder: Path, step: int) -> None:
    saver = Saver(folder, engine, config.train, place, agreement)
    assert saver.save(RunState(step=step)) and saver.wait()


def losses_of(place, config, engine, agreement, steps: range) -> list[float]:
    results = [engine.step(step, micro_batches(config, place, step)) for step in steps]
    return [global_loss(engine, agreement, result) for result in results]


def both(place, folder: Path) -> tuple[dict[int, list[float]], list[list[float]]]:
    return another_micro_batch(place, folder / "micro"), other_precisions(place, folder / "precision")


@pytest.mark.slow
def test_another_micro_batch_and_another_precision_continue(tmp_path: Path) -> None:
    """Accumulation follows the micro-batch (without dropout, whose masks are drawn per micro-batch). What is saved is
    fp32 in every precision, so another one goes on from the same state."""
    by_micro, (first, second, third, whole) = run_ranks(2, both, tmp_path)[0]
    assert by_micro[1] == pytest.approx(by_micro[2], abs=1e-5)
    assert by_micro[4] == pytest.approx(by_micro[2], abs=1e-5)
    assert first == whole[:4]
    assert second != whole[4:8] and second == pytest.approx(whole[4:8], abs=5e-2)
    assert third == pytest.approx(whole[8:], abs=5e-2)
