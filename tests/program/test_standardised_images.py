"""The norm behind the vision tower through the programs: fitted once, on any number of ranks, kept by what goes on."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoint.files import checkpoint_path
from pipeline.checkpoint.reading import Reader
from pipeline.evaluate import main as evaluate
from tests.forked_ranks import run_ranks
from tests.program.test_incidents import train
from tests.program.test_program import SHORT, work  # noqa: F401 (a fixture)

pytestmark = pytest.mark.slow
STILL = ("--train.steps", 1, "--optim.learning_rate", "1e-30", "--train.save_every", 1, "--train.eval_every", 0)
NAMES = ("net.image_norm.weight", "net.image_norm.bias")


def begun(run: Path, data: Path, *more: Any, ranks: int = 1) -> torch.Tensor | None:
    """Weight and bias [2, W] behind one step that moves nothing; None where the model has none."""
    words = [*SHORT, "--data", data, "--output", run, *STILL, *more]
    assert run_ranks(ranks, train, [str(word) for word in words]) == [0] * ranks
    reader = Reader(checkpoint_path(run, 1))
    if NAMES[0] not in reader.shapes("weight"):
        return None
    return torch.stack([reader.read("weight", one) for one in NAMES]).round(decimals=20)


def test_it_is_fitted_to_the_first_images(work: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    on = ("--model.vision.standardise", "true")
    alone, together = (begun(tmp_path / f"run{ranks}", work / "data", *on, ranks=ranks) for ranks in (1, 2))
    assert torch.equal(alone, together)
    assert (alone[0] > 1).all() and alone[1].abs().min() > 0  # channels of random towers differ little

    assert begun(tmp_path / "plain", work / "data") is None
    with pytest.raises(RuntimeError, match="has no norm behind its vision tower; set model.vision.standardise false"):
        begun(tmp_path / "on", work / "data", *on, "--model.weights", tmp_path / "plain")
    other = ("--train.seed", 5, "--model.weights", tmp_path / "run1")  # other first images
    assert torch.equal(begun(tmp_path / "further", work / "data", *on, *other), alone)
    assert not torch.equal(begun(tmp_path / "other", work / "data", *on, *other[:2]), alone)
    assert evaluate(["--run", str(tmp_path / "run1"), "--split", "dev"]) == 0
    assert "flm_loss" in capfd.readouterr().out
