"""The parts of a run's set-up, each by itself: opening, continuing, records; no engine and no other rank is needed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from data_prep.manifest import ManifestError
from pipeline.checkpoint.files import CheckpointError, PartWriter, Piece, checkpoint_path, publish
from pipeline.checkpoint.state import RunState
from pipeline.config.command_line import Launch, parse_command_line
from pipeline.config.options import ConfigError
from pipeline.distributed.connecting import Ranks
from pipeline.distributed.places import Place
from pipeline.distributed.preempt import StopRequest
from pipeline.distributed.ranks import Agreement
from pipeline.training.session import continue_run, open_records, open_run
from tests.tiny_corpus import make_corpus

ALONE = Ranks(Place(0, 1, 0, "single"), torch.device("cpu"), Agreement(), StopRequest())


class FakeEngine:
    """What continuing asks of an engine: one parameter, and where it was told to stand."""

    stage, precision, frozen, optimizer_steps, loss_scale, skipped_steps = 1, "fp32", None, 0, None, 0

    def shapes(self, kind: str, has_moments: bool) -> dict[str, tuple[int, ...]]:
        return {"w": (2,)} if kind == "weight" or has_moments else {}

    def load_named_state(self, read, optimizer_steps: int) -> None:
        [held] = read("weight", [("w", 0, 2)])
        self.loaded, self.optimizer_steps = held.tolist(), optimizer_steps


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("session"), train=20, dev=4)


def launch(data: Path, output: Path, *words: str) -> Launch:
    settings = ["--recipe", "flm_tiny", "--data", str(data / "synth"), "--output", str(output)]
    return parse_command_line([*settings, "--data.tokenizer", str(data / "tokenizer"), *words])


def save(output: Path, state: RunState) -> None:
    """A checkpoint of one parameter, without moments."""
    folder = checkpoint_path(output, state.step).with_suffix(".tmp")
    folder.mkdir(parents=True)
    writer = PartWriter(folder, 0)
    writer.add(Piece("w", 0, (2,), {"weight": torch.tensor([1.0, 2.0])}))
    publish(folder, checkpoint_path(output, state.step), vars(state), writer.finish())


def test_a_new_run_leaves_no_folder_before_it_is_built(data: Path, tmp_path: Path) -> None:
    opened = open_run(launch(data, tmp_path / "run"), 1, ALONE)
    assert opened.saved is None and opened.lock is None and opened.data_changes == {} and opened.passed_by == []
    assert not (tmp_path / "run").exists() and opened.fingerprint["optim"] == {"batch_size": 16}
    assert [len(corpus) for corpus in (*opened.data.corpora, *opened.data.held_out)] == [20, 4]
    with pytest.raises(ManifestError, match="1 image.*expected 2"):
        open_run(launch(data, tmp_path / "run"), 2, ALONE)


def test_a_run_goes_on_from_its_checkpoint_or_says_why_not(data: Path, tmp_path: Path) -> None:
    run, *others = (tmp_path / name for name in ("run", "other_rate", "fewer_steps"))
    begun = open_run(launch(data, run), 1, ALONE)
    save(run, RunState(step=3, samples_seen=48, fingerprint=begun.fingerprint, topology={"world_size": 2}))
    for other in others:  # a process holds the lock of a run that it opened
        shutil.copytree(run, other)
    again = open_run(launch(data, run), 1, ALONE)
    engine = FakeEngine()
    state, changes = continue_run(again, engine, ALONE)
    assert state.step == 3 and engine.loaded == [1.0, 2.0] and state.topology["world_size"] == 1
    assert any("another topology: 1 ranks" in change for change in changes)
    records = open_records(again, engine, state, ALONE)
    records.writer.log(4, {"loss": 1.0})
    records.writer.close()
    assert json.loads((run / "log.jsonl").read_text().splitlines()[-1])["step"] == 4

    with pytest.raises(ConfigError, match="another objective.corruption_rate 0.0 -> 0.5"):
        open_run(launch(data, others[0], "--objective.corruption_rate", "0.5"), 1, ALONE)
    with pytest.raises(ConfigError, match="has done 3 steps, train.steps is 2"):
        open_run(launch(data, others[1], "--train.steps", "2"), 1, ALONE)


@pytest.mark.parametrize(
    ("epochs", "steps"),
    [("3", 4), ("0.8", 1), ("1.6", 2), ("0.01", 1), ("5.6", 7), ("5.61", 8)],  # of 20 samples, 16 to a batch
)
def test_epochs_are_passes_over_the_samples_the_last_batch_included(data: Path, epochs: str, steps: int) -> None:
    asked = launch(data, Path("nowhere"), "--train.epochs", epochs)
    open_run(asked, 1, ALONE)
    assert asked.config.train.steps == steps


def test_patience_without_anything_held_out_is_refused(data: Path) -> None:
    words = ["--train.keep_best", "flm_loss", "--train.patience", "2", "--data.eval_split", "test"]
    with pytest.raises(ConfigError, match="counts evaluations, and there is no split 'test'"):
        open_run(launch(data, Path("nowhere"), *words), 1, ALONE)


def test_a_position_that_the_steps_do_not_lead_to_is_refused(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    save(run, RunState(step=3, samples_seen=47, fingerprint=open_run(launch(data, run), 1, ALONE).fingerprint))
    with pytest.raises(CheckpointError, match="says 47 samples were seen, expected 48"):
        continue_run(open_run(launch(data, run), 1, ALONE), FakeEngine(), ALONE)
