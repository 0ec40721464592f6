"""What a resumed program does besides training on: owed evaluations, cut-back files, changes said or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipeline.checkpoint.changes import describe_changes, refuse_fewer_steps, schedule_settings
from pipeline.cluster.restarts import read_attempts
from pipeline.config.options import Config, ConfigError, TrainConfig
from pipeline.recording.sample_keys import read_sample_keys
from pipeline.reporting.page import write_report
from tests.program.test_program import SHORT, finish, program, work  # noqa: F401 (a fixture)

OPTIONS = [*SHORT, "--train.steps", "6", "--train.eval_every", "2", "--train.save_every", "2", "--train.keep_last", "9"]
OPTIONS += ["--tracking.sample_keys", "true"]


def raw_log(run: Path) -> list[tuple[str, int, float]]:
    """Every line with a loss as it stands in the file; a torn one raises."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(record["kind"], record["step"], record["loss"]) for record in records if "loss" in record]


def go_back_to(run: Path, step: int) -> None:
    """Leave no checkpoint after ``step``, as if the run had been killed before the next one."""
    for folder in (run / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)


@pytest.fixture(scope="module")
def whole(work: Path) -> Path:  # noqa: F811
    done = finish(program(*OPTIONS, "--output", "runs/resume"), work)
    assert done.returncode == 0, done.stderr
    return work / "runs" / "resume"


@pytest.mark.slow
def test_an_evaluation_that_a_kill_cut_off_is_made_up_for(work: Path, whole: Path) -> None:  # noqa: F811
    """Killed between the save after step 4 and the evaluation after step 4, with a line torn in each file."""
    run = shutil.copytree(whole, work / "runs" / "owed")
    go_back_to(run, 4)
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if (r := json.loads(line))["step"] < 4 or (r["step"], r["kind"]) == (4, "train")]
    (run / "log.jsonl").write_text("".join(kept) + '{"kind": "ev')
    bad = [json.dumps({"step": step, "key": "k", "reason": "r"}) + "\n" for step in (4, 5)]
    (run / "unusable.jsonl").write_text("".join(bad))
    with (run / "sample_keys-rank0.jsonl").open("a") as file:
        file.write('{"step": 7, "ke')
    done = finish(program(*OPTIONS, "--output", run), work)
    assert done.returncode == 0, done.stderr
    assert raw_log(run) == raw_log(whole)
    assert read_sample_keys(run) == read_sample_keys(whole)
    assert (run / "unusable.jsonl").read_text() == bad[0]
    attempts = read_attempts(run)
    assert [one["step"] for one in attempts] == [0, 4] and attempts[1]["topology"]["world_size"] == 1
    assert attempts[1]["topology"].keys() >= {"zero_stage", "precision"}
    assert "after a pause of" in write_report(run).read_text(), "the report marks the resume"


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_starts_over(work: Path, whole: Path) -> None:  # noqa: F811
    run = shutil.copytree(whole, work / "runs" / "over")
    shutil.rmtree(run / "checkpoints")
    done = finish(program(*OPTIONS, "--output", run), work)
    assert done.returncode == 0, done.stderr
    assert raw_log(run) == raw_log(whole)
    assert read_sample_keys(run) == read_sample_keys(whole)


@pytest.mark.slow
def test_changes_are_said(work: Path, whole: Path) -> None:  # noqa: F811
    run = shutil.copytree(whole, work / "runs" / "changed")
    changed = ["--train.steps", "7", "--optim.learning_rate", "0.002", "--optim.micro_batch_size", "8"]
    done = finish(program(*OPTIONS, "--output", run, *changed), work)
    assert done.returncode == 0, done.stderr
    for line in (
        "continuing with another train.steps: 7 (was 6)",
        "continuing with another optim.learning_rate: 0.002 (was 0.001)",
        "micro-batches of 8 (was 1 ranks, ZeRO 1, micro-batches of 4); same samples, other dropout masks",
    ):
        assert line in done.stdout
    assert [record for record in raw_log(run) if record[1] <= 6] == raw_log(whole)


def test_what_changed_is_named() -> None:
    config = Config()
    settings = schedule_settings(config)
    topology = {"world_size": 2, "zero_stage": 2, "precision": "bf16", "micro_batch_size": 4}
    assert describe_changes(topology, topology, settings, settings) == []
    assert describe_changes({}, topology, {}, settings) == []
    config.train.steps, config.optim.betas = 10, (0.5, 0.6)
    lines = describe_changes(
        topology, topology | {"zero_stage": 3, "precision": "fp32"}, settings, schedule_settings(config)
    )
    assert len(lines) == 4
    assert "2 ranks, ZeRO 3" in lines[0] and "up to rounding" in lines[0]
    assert "another precision: fp32 (was bf16)" in lines[1]
    assert "optim.betas: [0.5, 0.6] (was [0.9, 0.98])" in lines[2] and "train.steps: 10 (was 30000)" in lines[3]
    assert "other dropout masks" in describe_changes(topology, topology | {"micro_batch_size": 8}, {}, {})[0]


def test_settings_survive_json() -> None:
    settings = schedule_settings(Config())
    assert json.loads(json.dumps(settings)) == settings


def test_a_run_cannot_end_before_where_it_is(tmp_path: Path) -> None:
    refuse_fewer_steps(tmp_path, 5, TrainConfig(steps=5))
    with pytest.raises(ConfigError, match="train.steps is 5; use --train.steps 6 or more"):
        refuse_fewer_steps(tmp_path, 6, TrainConfig(steps=5))
    with pytest.raises(ConfigError, match="train.epochs 0.5 are 5 steps; use more --train.epochs"):
        refuse_fewer_steps(tmp_path, 6, TrainConfig(steps=5, epochs=0.5))


def test_the_fp16_loss_scale_continues() -> None:
    """DeepSpeed's own scaler, which runs on no CPU engine: restored in mid-course it scales as the one that went on."""
    from types import SimpleNamespace

    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    from pipeline.engine.engine import TrainEngine

    def fp16_engine() -> TrainEngine:
        scaler = DynamicLossScaler(2.0**16, 3, 1.0, 2, False)
        scaler.update_scale(False)  # or its messages would ask for the rank
        engine = TrainEngine.__new__(TrainEngine)
        engine.precision, engine._deepspeed = "fp16", SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler))
        return engine

    def scales(engine: TrainEngine, overflows: str) -> list[float]:
        scaler, found = engine._deepspeed.optimizer.loss_scaler, []
        for letter in overflows:
            if letter == "x":  # what update_scale does at an overflow, without asking for the rank
                lower = scaler.delayed_shift == 1 or scaler.cur_hysteresis == 1
                scaler.cur_scale = scaler.cur_scale / 2 if lower else scaler.cur_scale
                scaler.cur_hysteresis -= not lower
                scaler.last_overflow_iter = scaler.cur_iter
                scaler.cur_iter += 1
            else:
                scaler.update_scale(False)
            found.append(scaler.cur_scale)
        return found

    whole, resumed = fp16_engine(), fp16_engine()
    scales(whole, "..x..x.")
    resumed.loss_scale = json.loads(json.dumps(whole.loss_scale))
    rest = "..x....xx......"
    fresh = scales(fp16_engine(), rest)
    expected = scales(whole, rest)
    assert scales(resumed, rest) == expected != fresh


def test_a_tokenizer_copied_in_part_is_no_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.training.run_files import copy_tokenizer

    source, output = tmp_path / "source", tmp_path / "run"
    source.mkdir()
    output.mkdir()
    (source / "onnx").mkdir()
    for name in ("a.json", "b.json", "model.safetensors", "onnx/c.json"):  # a model's folder, weights and all
        (source / name).write_text(name)

    def killed_half_way(_: Path, target: Path, **__) -> None:
        target.mkdir()
        (target / "a.json").write_text("a.")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "copytree", killed_half_way)
        copy_tokenizer(source, output)
    assert not (output / "tokenizer").exists()
    copy_tokenizer(source, output)
    assert {path.name: path.read_text() for path in (output / "tokenizer").iterdir()} == {
        "a.json": "a.json",
        "b.json": "b.json",
    }
    assert [path.name for path in output.iterdir()] == ["tokenizer"]
