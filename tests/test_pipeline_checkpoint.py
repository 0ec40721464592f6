"""Checkpoints: a resumed run is the same run, at any topology; damage is noticed; nothing half-written counts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from pipeline import checkpoint, checkpoint_files
from pipeline.checkpoint import CheckpointError, RunState
from pipeline.config import Config
from pipeline.saver import Saver
from tests.forked_ranks import run_ranks
from tests.test_pipeline_engine import global_loss, make_engine, micro_batches, tiny_config
from tests.tiny_objective import TinyObjective


def train(place, config: Config, stage: int, run: Path, stop: int, save_at: int | None) -> list[float]:
    """Train up to ``stop`` with dropout, from the newest checkpoint if there is one; losses of the steps done here."""
    engine, agreement = make_engine(place, config, stage, lambda: TinyObjective(0.3))
    state = checkpoint.resume(run, engine, agreement, place.is_main) or RunState()
    saver = Saver(run, engine, config.train, place, agreement)
    losses = []
    while state.step < stop:
        result = engine.step(state.step, micro_batches(config, place, state.step))
        losses.append(global_loss(engine, agreement, result))
        state = dataclasses.replace(state, step=state.step + 1)
        if state.step == save_at:
            assert saver.save(state)
        saver.advance(agreement.total(saver.votes())[0])
    assert saver.wait()
    return losses


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (2, "bf16")])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, stage: int, precision: str) -> None:
    """Invariant 2, on one topology: bit for bit."""
    config = tiny_config(precision=precision)
    whole = run_ranks(2, train, config, stage, tmp_path / "whole", 8, None)[0]
    first = run_ranks(2, train, config, stage, tmp_path / "parts", 5, 5)[0]
    second = run_ranks(2, train, config, stage, tmp_path / "parts", 8, None)[0]
    assert first + second == whole


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "stage"), [(1, 0), (1, 3), (2, 0), (2, 1), (2, 3)])
def test_another_topology_continues(tmp_path: Path, world_size: int, stage: int) -> None:
    """Saved by 2 ranks at stage 2; the dropout of a micro-batch depends on its place in the step, not on its rank."""
    config = tiny_config()
    run_ranks(2, train, config, 2, tmp_path, 5, 5)
    expected = run_ranks(2, train, config, 2, tmp_path, 8, None)[0]
    found = run_ranks(world_size, train, config, stage, tmp_path, 8, None)[0]
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")

    def three_times(place, config: Config) -> None:
        engine, agreement = make_engine(place, config, 1)
        saver = Saver(run, engine, config.train, place, agreement)
        for step in range(3):
            engine.step(step, micro_batches(config, place, step))
            saver.save(RunState(step=step + 1))
        assert saver.wait()

    run_ranks(2, three_times, tiny_config())
    return run


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    import shutil

    return shutil.copytree(saved, tmp_path / "run")


def test_retention_keeps_the_newest(saved: Path) -> None:
    assert sorted(path.name for path in (saved / "checkpoints").iterdir()) == ["step_00000002", "step_00000003"]


def files_of(checkpoint_folder: Path) -> list[str]:
    return sorted(path.name for path in checkpoint_folder.iterdir())


@pytest.mark.parametrize("damage", ["truncated", "flipped", "deleted", "zeroed"])
def test_damage_to_any_file_falls_back(run: Path, damage: str) -> None:
    """Invariant 6."""
    newest = run / "checkpoints" / "step_00000003"
    assert checkpoint.newest_valid(run) == (newest, [])
    for name in files_of(newest):
        path = newest / name
        content = path.read_bytes()
        if damage == "deleted":
            path.unlink()
        else:
            middle = len(content) // 2
            flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            path.write_bytes({"truncated": content[:-1], "zeroed": b"", "flipped": flipped}[damage])
        found, skipped = checkpoint.newest_valid(run)
        if name == "manifest.json" and damage == "flipped" and found == newest:
            pytest.fail("a flipped bit of the manifest went unnoticed")
        assert found == run / "checkpoints" / "step_00000002", name
        assert len(skipped) == 1 and skipped[0].startswith("step_00000003: ")
        path.write_bytes(content)


def test_an_interrupted_save_is_not_a_checkpoint(run: Path) -> None:
    (run / "checkpoints" / "step_00000003").rename(run / "checkpoints" / "step_00000003.tmp")
    assert checkpoint.newest_valid(run)[0] == run / "checkpoints" / "step_00000002"


def test_all_damaged_is_an_error_not_a_fresh_start(run: Path) -> None:
    for folder in (run / "checkpoints").iterdir():
        (folder / "state.json").unlink()
    with pytest.raises(RuntimeError, match="no checkpoint is valid"):
        run_ranks(1, train, tiny_config(), 1, run, 4, None)
    with pytest.raises(CheckpointError, match="state.json is missing"):
        checkpoint.load_weights(run)


def test_weights_are_read_without_an_engine(run: Path) -> None:
    weights = checkpoint.load_weights(run)
    model = TinyObjective()
    assert set(weights) == set(model.state_dict())
    model.load_state_dict(weights)
    older = checkpoint.load_weights(run / "checkpoints" / "step_00000002")
    assert not torch.equal(older["head.weight"], weights["head.weight"])
    assert checkpoint.weights_hash(weights) != checkpoint.weights_hash(older)
    assert checkpoint.weights_hash(weights) == checkpoint.weights_hash(dict(reversed(weights.items())))


def test_a_pickle_or_a_path_out_of_the_folder_is_refused(run: Path) -> None:
    """Invariant 7: the manifest names files of its own folder only, and only safetensors and JSON are opened."""
    folder = run / "checkpoints" / "step_00000003"
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../outside"] = {"bytes": 0, "sha256": ""}
    del manifest["sha256"]
    (folder / "manifest.json").write_bytes(checkpoint_files._with_own_hash(manifest))
    assert "lists '../outside', which is no file of a checkpoint" in checkpoint.defect(folder)
