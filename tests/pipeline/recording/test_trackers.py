"""TensorBoard and Weights & Biases: what they get, and that their failures cost them and never the run."""

from __future__ import annotations

import inspect
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest

from pipeline.recording import trackers
from pipeline.recording.run_log import LOG_NAME, MetricsWriter, read_log
from pipeline.recording.trackers import TrackerError, check_trackers


def train(run: Path, steps: range = range(1, 4), **options: bool) -> None:
    """What a run does with its numbers."""
    writer = MetricsWriter(run, {"seed": 1}, is_main=True, **{"tensorboard": False, "wandb": True} | options)
    for step in steps:
        writer.log(step, {"loss": 1.0 / step, "note": "a text", "missing": None})
    writer.close()


class FakeWandb(types.ModuleType):
    """A stand-in with the names of wandb that we call; the method ``fails`` raises."""

    def __init__(self, fails: str = "") -> None:
        super().__init__("wandb")
        self.fails, self.calls = fails, []

    def Settings(self, **settings: Any) -> dict[str, Any]:
        return settings

    def init(self, **arguments: Any) -> FakeWandb:
        return self._called("init", arguments)

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self._called("define_metric", name)

    def log(self, data: dict[str, Any]) -> None:
        self._called("log", data)

    def finish(self) -> None:
        self._called("finish", None)

    def _called(self, name: str, value: Any) -> FakeWandb:
        self.calls.append((name, value))
        if name == self.fails:
            raise RuntimeError("network unreachable\nthe second line")
        return self


def test_the_stand_in_has_the_names_of_wandb() -> None:
    wandb = pytest.importorskip("wandb")
    assert {"project", "name", "id", "resume", "dir", "config", "settings"} <= set(
        inspect.signature(wandb.init).parameters
    )
    assert "console" in wandb.Settings.model_fields
    for name in ("define_metric", "log", "finish"):
        ours, theirs = (inspect.signature(getattr(cls, name)) for cls in (FakeWandb, wandb.Run))
        assert list(ours.parameters)[:3] == list(theirs.parameters)[: len(ours.parameters)]


@pytest.mark.parametrize("fails", ["init", "define_metric", "log", "finish"])
def test_wandb_that_fails_costs_wandb_only(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    fake = FakeWandb(fails)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train(tmp_path)
    assert [record["step"] for record in read_log(tmp_path / LOG_NAME)] == [1, 2, 3]
    message = "ALARM: no more numbers to Weights & Biases: network unreachable the second line\n"
    assert capsys.readouterr().err == message, "once"
    assert [name for name, _ in fake.calls].count(fails) == 1


def test_a_resumed_run_is_the_same_run_at_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train(tmp_path)
    train(tmp_path, range(4, 6))
    first, second = (value for name, value in fake.calls if name == "init")
    assert first["id"] == second["id"] and first["resume"] == "allow" and first["dir"] == str(tmp_path)
    assert [value for name, value in fake.calls if name == "log"][0] == {"step": 1, "train/loss": 1.0}
    train(tmp_path / "another")
    assert fake.calls[-6][1]["id"] != first["id"]


def test_wandb_that_never_finishes_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    fake, forever = FakeWandb(), threading.Event()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(fake, "finish", forever.wait)
    monkeypatch.setattr(trackers, "FINISH_SECONDS", 0.0)
    train(tmp_path)
    forever.set()
    assert "Weights & Biases: not done after 0 s; send the rest by: wandb sync" in capsys.readouterr().err


def test_missing_wandb_is_said_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers(wandb=False)
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
    check_trackers(wandb=True)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(TrackerError, match="pip install wandb==0.30.0") as error:
        check_trackers(wandb=True)
    assert "\n" not in str(error.value)
    check_trackers(wandb=False)


def test_tensorboard_that_fails_costs_tensorboard_only(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    train(tmp_path, tensorboard=True, wandb=False)
    assert [record["step"] for record in read_log(tmp_path / LOG_NAME)] == [1, 2, 3]
    message = capsys.readouterr().err
    assert message.startswith("ALARM: no more numbers to TensorBoard: ") and message.count("\n") == 1


@pytest.mark.slow
def test_wandb_itself_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    train(tmp_path / "run")
    train(tmp_path / "run", range(4, 6))
    identity = (tmp_path / "run" / trackers.WANDB_ID_NAME).read_text()
    folders = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{identity}"))
    assert folders and all(list(folder.glob("*.wandb"))[0].stat().st_size > 0 for folder in folders)
    assert "ALARM" not in capfd.readouterr().err
