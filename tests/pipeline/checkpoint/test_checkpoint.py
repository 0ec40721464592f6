"""Checkpoints: a resumed run is the same run, at any topology; damage is noticed; nothing half-written counts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from model.config import TextConfig, VisionConfig
from pipeline.checkpoint import files as checkpoint_files
from pipeline.checkpoint import restore
from pipeline.checkpoint.files import KINDS, CheckpointError, defect, newest_valid, seal, weights_hash
from pipeline.checkpoint.saver import Saver
from pipeline.checkpoint.state import RunState
from pipeline.config.options import Config
from pipeline.generate import main as generate
from pipeline.weights.sources import load_text, load_vision
from tests.forked_ranks import run_ranks
from tests.pipeline.engine.test_engine import global_loss, make_engine, micro_batches, tiny_config
from tests.tiny_objective import TinyObjective


def train(place, config: Config, stage: int, run: Path, stop: int, save_at: int | None) -> list[float]:
    """Train up to ``stop`` with dropout, from the newest checkpoint if there is one; losses of the steps done here."""
    engine, agreement = make_engine(place, config, stage, lambda: TinyObjective(0.3))
    state = restore.resume(run, engine, agreement, place.is_main) or RunState()
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


@pytest.mark.slow(25)
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


@pytest.mark.slow
def test_retention_keeps_the_newest(saved: Path) -> None:
    assert sorted(path.name for path in (saved / "checkpoints").iterdir()) == ["step_00000002", "step_00000003"]


def files_of(checkpoint_folder: Path) -> list[str]:
    return sorted(path.name for path in checkpoint_folder.iterdir())


def damages(content: bytes) -> dict[str, bytes | None]:
    """What can happen to a file's bytes, by name; None is a file that is gone."""
    found: dict[str, bytes | None] = {
        "deleted": None,
        "emptied": b"",
        "truncated by a byte": content[:-1],
        "truncated to half": content[: len(content) // 2],
        "zeroed": bytes(len(content)),
        "longer": content + b" ",
    }
    for position in {0, 7, 8, 40, len(content) // 3, len(content) // 2, len(content) - 2, len(content) - 1}:
        for bit in (0, 5):
            flipped = bytearray(content)
            flipped[position] ^= 1 << bit
            found[f"bit {bit} of byte {position} flipped"] = bytes(flipped)
    return found


def test_damage_to_any_file_falls_back(run: Path) -> None:
    """Invariant 6: every file of a checkpoint that two ranks wrote, damaged in every way in turn."""
    newest = run / "checkpoints" / "step_00000003"
    assert newest_valid(run) == (newest, [])
    names = files_of(newest)
    assert {f"{kind}-0000{rank}-00000.safetensors" for kind in KINDS for rank in (0, 1)} < set(names)
    for name in names:
        path = newest / name
        content = path.read_bytes()
        for damage, damaged in damages(content).items():
            path.unlink() if damaged is None else path.write_bytes(damaged)
            found, skipped = newest_valid(run)
            assert found == run / "checkpoints" / "step_00000002", (name, damage)
            assert len(skipped) == 1 and skipped[0].startswith("step_00000003: "), (name, damage)
            path.write_bytes(content)
    assert newest_valid(run) == (newest, [])


def test_every_bit_of_the_manifest_counts(run: Path) -> None:
    folder = run / "checkpoints" / "step_00000003"
    content = (folder / "manifest.json").read_bytes()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        (folder / "manifest.json").write_bytes(bytes(flipped))
        with pytest.raises((ValueError, KeyError, TypeError)):
            checkpoint_files.read_manifest(folder)


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "weight-00001-00000.safetensors", "."])
def test_links_are_no_files_of_a_checkpoint(run: Path, name: str) -> None:
    """Invariant 7."""
    path = run / "checkpoints" / "step_00000003" / name
    path.rename(run / "elsewhere")
    path.symlink_to(run / "elsewhere")
    found, skipped = newest_valid(run)
    assert found.name == "step_00000002" and "link" in skipped[0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        "[]",
        "null",
        "[" * 100_000,
        "\xff",
        '{"step": 1e999}',
        '{"step": null}',
        '{"step": 3, "frozen": 3}',
        '{"step": 3, "frozen": {"names": []}}',
    ],
    ids=lambda text: text[:20],
)
def test_a_state_that_is_none_is_an_error_of_one_line(run: Path, text: str) -> None:
    """Invariant 7: also where somebody gave it a fitting hash."""
    folder = run / "checkpoints" / "step_00000003"
    (folder / "state.json").write_bytes(text.encode("latin-1"))
    content = json.loads((folder / "manifest.json").read_bytes())
    content.pop("sha256")
    content["files"]["state.json"] = checkpoint_files.seal(folder / "state.json")
    (folder / "manifest.json").write_bytes(checkpoint_files._with_own_hash(content))
    assert checkpoint_files.defect(folder) is None
    with pytest.raises(CheckpointError, match="state.json") as error:
        restore.load_weights(folder)
    assert "\n" not in str(error.value)


def test_a_renamed_checkpoint_is_noticed(run: Path) -> None:
    (run / "checkpoints" / "step_00000002").rename(run / "checkpoints" / "step_00000009")
    found, skipped = newest_valid(run)
    assert found.name == "step_00000003" and "of step 2: a renamed folder" in skipped[0]


def test_an_interrupted_save_is_not_a_checkpoint(run: Path) -> None:
    (run / "checkpoints" / "step_00000003").rename(run / "checkpoints" / "step_00000003.tmp")
    assert newest_valid(run)[0] == run / "checkpoints" / "step_00000002"


def test_all_damaged_is_an_error_not_a_fresh_start(run: Path) -> None:
    for folder in (run / "checkpoints").iterdir():
        (folder / "state.json").unlink()
    with pytest.raises(RuntimeError, match="no checkpoint is valid"):
        run_ranks(1, train, tiny_config(), 1, run, 4, None)
    with pytest.raises(CheckpointError, match="state.json is missing"):
        restore.load_weights(run)


def test_weights_are_read_without_an_engine(run: Path) -> None:
    weights = restore.load_weights(run)
    model = TinyObjective()
    assert set(weights) == set(model.state_dict())
    model.load_state_dict(weights)
    older = restore.load_weights(run / "checkpoints" / "step_00000002")
    assert not torch.equal(older["head.weight"], weights["head.weight"])
    assert weights_hash(weights) != weights_hash(older)
    assert weights_hash(weights) == weights_hash(dict(reversed(weights.items())))


def rewrite_manifest(folder: Path, files: dict) -> None:
    """What someone can do who may write the folder: a manifest that fits, own hash included."""
    content = checkpoint_files.read_manifest(folder)
    content["files"] |= files
    (folder / "manifest.json").write_bytes(checkpoint_files._with_own_hash(content))


def test_a_path_out_of_the_folder_is_refused(run: Path) -> None:
    """Invariant 7: the manifest names files of its own folder only."""
    folder = run / "checkpoints" / "step_00000003"
    for name in ("../outside", "/etc/passwd", "weight-00000-00000.pt", "..", "extra/weight-00000-00000.safetensors"):
        content = (folder / "manifest.json").read_bytes()
        rewrite_manifest(folder, {name: {"bytes": 0, "sha256": ""}})
        assert f"lists {name!r}, which is no file of a checkpoint" in defect(folder)
        (folder / "manifest.json").write_bytes(content)


class CreatesFile:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self):
        return Path.touch, (self._path,)


@pytest.mark.slow
def test_a_pickle_is_refused_everywhere_and_never_executed(run: Path, tmp_path: Path) -> None:
    """Invariant 7: as a weights file, as a checkpoint, and as a file of a checkpoint with a manifest that fits."""
    trace = tmp_path / "executed"
    for name, arguments in (("new.pt", {}), ("old.pt", {"_use_new_zipfile_serialization": False})):
        torch.save({"visual.conv1.weight": CreatesFile(trace)}, tmp_path / name, **arguments)
    pickled = (tmp_path / "old.pt").read_bytes()
    (tmp_path / "posing.safetensors").write_bytes(pickled)
    torch.load(tmp_path / "new.pt", weights_only=False)
    assert trace.is_file(), "the pickle does execute where it is let"
    trace.unlink()

    for name in ("new.pt", "old.pt", "posing.safetensors"):
        with pytest.raises(ValueError, match="is not a"):
            load_vision(TinyObjective(), VisionConfig(pretrained=str(tmp_path / name)))
        with pytest.raises(CheckpointError, match="is a file"):
            restore.load_weights(tmp_path / name)
        assert generate(["--run", str(tmp_path / name), "picture.png"]) == 2
    roberta = tmp_path / "roberta"
    roberta.mkdir()
    (roberta / "config.json").write_text('{"model_type": "roberta"}')
    (roberta / "pytorch_model.bin").write_bytes(pickled)
    with pytest.raises(ValueError, match="can't be loaded"):
        load_text(TinyObjective(), TextConfig(pretrained=str(roberta)))

    folder = run / "checkpoints" / "step_00000003"
    (folder / "weight-00000-00000.safetensors").write_bytes(pickled)
    assert "SHA-256" in defect(folder) or "bytes" in defect(folder)
    rewrite_manifest(folder, {"weight-00000-00000.safetensors": seal(folder / "weight-00000-00000.safetensors")})
    assert defect(folder) is None, "sizes and hashes are integrity, not authenticity"
    with pytest.raises(CheckpointError, match="holds no tensors of ours"):
        restore.load_weights(folder)
    with pytest.raises(RuntimeError, match="holds no tensors of ours"):
        run_ranks(1, train, tiny_config(), 1, run, 4, None)
    assert not trace.exists()
