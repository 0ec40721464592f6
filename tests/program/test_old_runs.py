"""Runs begun by the code of November 2026 resume, are evaluated and caption as they did then (fixtures/old_run).

It holds a corpus, and a run of flm and one of mlm with their checkpoint after step 6 of 12, their log, and what was
found then: losses and gradient norms of all steps, held-out values and captions after step 6. Both drop 10 % of states.
"""

from __future__ import annotations

import json
import shlex
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from model.config import OPTIONS_OF, FLMOptions, ModelConfig, VisionConfig, option
from pipeline import evaluate, generate
from pipeline.config import options
from pipeline.config.recipes import RUN_CONFIG
from pipeline.recording.run_log import read_log
from tests.forked_program import Job, start_program

REPOSITORY = Path(__file__).resolve().parents[2]
FIXTURE = REPOSITORY / "tests" / "fixtures" / "old_run.tar.xz"
# Another processor sums in another order. n fp32 terms then differ by about sqrt(n) * 2^-24 of their size, 2e-6 for the
# 768 values of a patch; ten layers in turn make that 2e-5, and six steps, each from weights that differ by it, 1e-4.
# The captions are the same with every weight changed at random by 1e-5 of its size, a hundred times its rounding.
TOLERANCE = 1e-4


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the runs were started in; their data path is relative to it."""
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path / "old_run")
    return tmp_path / "old_run"


def finish(main: Callable | None, arguments: list, expected: int = 0, ranks: int = 1) -> str:
    """What a program prints on rank 0, started in the working folder."""
    job: Job = start_program(ranks, arguments, Path("output"), main)
    codes = job.finish(100)
    assert codes == [expected] * ranks, job.output(0)
    return job.output(0)


def command_of(run: Path) -> list[str]:
    """The words that the run was started with."""
    words = shlex.split(json.loads((run / "environment.json").read_text())["command"])[1:]
    return [str(REPOSITORY / word) if word.startswith("ds_configs/") else word for word in words]


def expected_of(run: Path) -> dict:
    return json.loads((run / "expected.json").read_text())


def assert_continued(run: Path, expected: dict) -> None:
    """Steps 7 to 12 stand in the log anew, with the losses and gradient norms that they had."""
    for name, key in (("losses", "loss"), ("grad_norms", "grad_norm")):
        found = {line["step"]: line[key] for line in read_log(run / "log.jsonl") if line["kind"] == "train"}
        wanted = {int(step): value for step, value in expected[name].items()}
        print(run.name, name, "bit-equal" if found == wanted else {s: found[s] - wanted[s] for s in wanted})
        assert found == pytest.approx(wanted, rel=TOLERANCE)
    assert (run / "checkpoints" / "step_00000012").is_dir()


def forget_the_end(run: Path) -> None:
    """Cut the log back to the checkpoint, so that what stands in it afterwards is new."""
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (run / "log.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 6))


@pytest.mark.parametrize("name", ["flm", pytest.param("mlm", marks=pytest.mark.slow)])
def test_an_old_run_resumes_by_the_command_it_was_started_with(old: Path, name: str) -> None:
    run, expected = old / name, expected_of(old / name)
    forget_the_end(run)
    finish(None, command_of(run))
    assert_continued(run, expected)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_an_old_run_resumes_at_another_stage(old: Path, stage: int) -> None:
    forget_the_end(old / "flm")
    json_file = REPOSITORY / "ds_configs" / f"zero{stage}.json"
    said = finish(None, [*command_of(old / "flm"), "--deepspeed", json_file, "--train.precision", "fp32"])
    assert f"another topology: 1 ranks, ZeRO {stage}" in said
    assert_continued(old / "flm", expected_of(old / "flm"))


@pytest.mark.slow
def test_an_old_run_resumes_on_two_ranks_as_on_one_with_two_micro_batches(old: Path) -> None:
    """Another micro-batch size draws other dropout masks, so the two are compared with each other."""
    found, command = [], command_of(old / "flm")
    for ranks in (1, 2):
        forget_the_end(old / "flm")
        for folder in (old / "flm" / "checkpoints").glob("step_00000012*"):
            folder.rename(old / f"aside-{ranks}")
        finish(None, [*command, "--optim.micro_batch_size", "4"], ranks=ranks)
        found.append({s["step"]: s["loss"] for s in read_log(old / "flm" / "log.jsonl") if s["kind"] == "train"})
    assert len(found[0]) == 12 and found[0] == pytest.approx(found[1], rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flm", "mlm"])
def test_an_old_checkpoint_is_evaluated_and_captions_as_it_did(old: Path, name: str) -> None:
    expected = expected_of(old / name)
    checkpoint = old / name / "checkpoints" / "step_00000006"
    values = finish(evaluate.main, ["--run", checkpoint])
    assert json.loads(values[values.index("{") :]) == pytest.approx(expected["evaluation"], rel=TOLERANCE, abs=1e-6)
    lengths = ["--lengths", "6", "8"] if name == "mlm" else []
    split = ["--data", "data/synth", "--split", "dev", "--samples", "4", "--output", "samples.json"]
    finish(generate.main, ["--run", checkpoint, *split, *lengths])
    samples = json.loads(Path("samples.json").read_text())["samples"]
    assert {one["key"]: one["caption"] for one in samples} == expected["captions"]


@dataclass
class LaterFLM(FLMOptions):
    smoothing: float = option(0.1, before=0.0)


@dataclass
class LaterVision(VisionConfig):
    as_before: bool = True


@dataclass
class LaterModel(ModelConfig):
    vision: LaterVision = field(default_factory=LaterVision)


@pytest.mark.slow
def test_an_old_run_resumes_with_options_that_came_later(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started by its config.yaml, which lists the options of all objectives."""
    monkeypatch.setitem(OPTIONS_OF, "flm", LaterFLM)
    monkeypatch.setattr(options, "ModelConfig", LaterModel)
    run = old / "flm"
    forget_the_end(run)
    settings = (run / RUN_CONFIG).rename(old / RUN_CONFIG)
    command = ["--deepspeed", REPOSITORY / "ds_configs" / "zero1.json", "--recipe", settings, "--output", run]
    refused = finish(None, command, expected=2)
    assert "another objective.smoothing 0.0 -> 0.1;" in refused and refused.count("error") == 1
    refused = finish(None, [*command, "--objective.smoothing", "0", "--model.vision.as_before", "false"], expected=2)
    assert "another model.vision.as_before True -> False;" in refused
    finish(None, [*command, "--objective.smoothing", "0"])
    assert_continued(run, expected_of(run))
    assert "smoothing: 0.0" in (run / RUN_CONFIG).read_text() and "mask_rate" not in (run / RUN_CONFIG).read_text()
