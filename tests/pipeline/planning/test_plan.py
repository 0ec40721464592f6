"""The planning program: what it prints, and the one line of each mistake."""

from __future__ import annotations

import argparse
import json

import pytest

from model.config import Vocabulary
from pipeline.config.command_line import parse_command_line
from pipeline.config.options import ConfigError
from pipeline.dry_run.counting import counted, valueless
from pipeline.plan import main
from pipeline.planning.configurations import between, micro_batch_sizes
from pipeline.planning.counts import text_lengths

VOCABULARY = Vocabulary(400, bos_id=0, pad_id=1, eos_id=2, mask_id=3)
TINY = ["--recipe", "flm_tiny", "--data", "nowhere", "--model.text.max_positions", "52"]


def plan(capsys: pytest.CaptureFixture, *words: str) -> tuple[int, str, str]:
    code = main([*TINY, "--optim.batch_size", "64", *words])
    found = capsys.readouterr()
    return code, found.out, found.err


@pytest.mark.slow
def test_it_says_what_fits_and_what_it_costs(capsys: pytest.CaptureFixture) -> None:
    code, out, err = plan(capsys, "--gpus", "16", "--gpu-memory", "80", "--deepspeed", "ds_configs/zero1.json")
    assert (code, err) == (0, "")
    for part in ("recipe flm_tiny", "16 GPUs of 80 GiB, 2 nodes", "* zero1.json", "--optim.micro_batch_size 4",
                 "memory of a GPU", "a step:", "data:", "checkpoint:", "20 steps"):  # fmt: skip
        assert part in out, (part, out)


def test_json_holds_the_same(capsys: pytest.CaptureFixture) -> None:
    words = ("--gpus", "8", "--gpu-memory", "80", "--deepspeed", "ds_configs/zero2.json", "--json")
    code, out, _ = plan(capsys, *words, "--optim.micro_batch_size", "2", "--model.activation_checkpointing", "false")
    found = json.loads(out)
    assert code == 0
    (only,) = found["configurations"]  # everything is fixed
    assert only == found["best"]
    assert (only["micro_batch_size"], only["accumulation"], only["zero_stage"]) == (2, 4, 2)
    assert only["memory_bytes"] == sum(only["memory_by_part"].values())
    assert only["step_seconds"] == pytest.approx(sum(only["seconds"].values()))
    assert found["checkpoint"]["bytes"] == 12 * found["parameters"]["trained"]


@pytest.mark.slow
def test_nothing_fits_and_what_would(capsys: pytest.CaptureFixture) -> None:
    one = ("--deepspeed", "ds_configs/zero2.json", "--model.activation_checkpointing", "true")
    code, out, err = plan(capsys, "--gpus", "8", "--gpu-memory", "1", *one)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "nothing fits 8 GPUs of 1 GiB: the least is" in err
    assert "zero2.json with a micro-batch of 1 and activation checkpointing; give --gpu-memory 3" in err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--gpus", "48", "--gpu-memory", "80"], "optim.batch_size 64 is not a multiple of 48 GPUs; use "
         "--optim.batch_size 48 or 96, or --gpus 32"),
        (["--gpus", "12", "--nodes", "5", "--gpu-memory", "80"], "--gpus 12 is not 5 nodes of 3 GPUs"),
        (["--gpus", "8", "--gpu-memory", "80", "--gpu", "abacus"], "--gpu abacus: its peak rate is not known"),
        (["--gpus", "8", "--gpu-memory", "80", "--recipe", "flm_bse_4m"], "no recipe named 'flm_bse_4m'"),
        (["--gpus", "8", "--gpu-memory", "80", "--optim.micro_batch", "4"], "unknown option --optim.micro_batch"),
        (["--gpus", "8", "--gpu-memory", "80", "--deepspeed", "no.json"], "no file no.json"),
        (["--gpus", "8", "--gpu-memory", "80", "--optim.micro_batch_size", "5"], "is not a multiple of "
         "optim.micro_batch_size 5"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(words: list[str], reason: str, capsys: pytest.CaptureFixture) -> None:
    code, out, err = plan(capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert reason in err


@pytest.mark.parametrize("words", [["--gpus", "0"], ["--gpus", "x"], ["--gpu-memory", "-1"], ["--gpu-memory", "nan"]])
def test_numbers_out_of_range_are_refused_by_name(words: list[str], capsys: pytest.CaptureFixture) -> None:
    code, out, err = plan(capsys, "--gpus", "8", "--gpu-memory", "80", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    kind = "a whole number of at least 1" if words[0] == "--gpus" else "a number above 0"
    assert f"argument {words[0]}: found '{words[1]}', expected {kind}" in err


def test_what_must_be_said_is_asked_for(capsys: pytest.CaptureFixture) -> None:
    code, _, err = plan(capsys, "--gpus", "8")
    assert (code, err) == (2, "error: command line: the following arguments are required: --gpu-memory\n")


@pytest.mark.slow
def test_a_gpu_without_bf16_is_planned_without_it(capsys: pytest.CaptureFixture) -> None:
    words = ("--deepspeed", "ds_configs/zero1.json", "--model.activation_checkpointing", "false", "--json")
    _, out, _ = plan(capsys, "--gpus", "8", "--gpu-memory", "32", "--gpu", "V100", *words)
    assert json.loads(out)["best"]["precision"] == "fp32"


def test_micro_batches_divide_the_share_of_a_rank() -> None:
    assert micro_batch_sizes(4096, 64) == [1, 2, 4, 8, 16, 32, 64]
    assert micro_batch_sizes(96, 8) == [1, 2, 4, 12]
    with pytest.raises(ConfigError, match="--gpus 3"):
        micro_batch_sizes(3, 8)


@pytest.mark.slow
def test_a_micro_batch_is_told_from_two_others() -> None:
    """Grids are as long as the longest text, rounded up to a multiple of 8, so that they do not grow in proportion."""
    config = parse_command_line(TINY).config
    objective = valueless(config, VOCABULARY, "fp32")
    low, high, real = (counted(objective, config, size, 12.0) for size in (16, 64, 32))
    told = between(low, high, 32)
    assert told.activations.peak == pytest.approx(real.activations.peak, rel=0.1)
    assert told.flops == pytest.approx(real.flops, rel=0.1)
    assert (told.samples, told.activations.operations) == (32, pytest.approx(real.activations.operations, rel=0.01))


@pytest.mark.parametrize("mean", [5.0, 12.0, 30.0])
def test_lengths_of_texts_have_the_mean(mean: float) -> None:
    found = text_lengths(1000, mean, 200)
    assert sum(found) / 1000 == pytest.approx(mean, rel=0.03)
    assert min(found) >= 3
    assert max(text_lengths(1000, mean, 20)) <= 20


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["--task.name", "snli_ve"],
        ["--task.name", "nlvr2"],
        ["--task.name", "captioning", "--model.behaviour", "released"],
        ["--task.name", "captioning"],
        ["--task.name", "retrieval", "--task.num_negatives", "3"],
        ["--task.name", "retrieval", "--task.num_negatives", "3", "--task.negatives", "in_batch"],
        ["--objective.name", "mlm"],
        ["--objective.name", "prefixlm", "--data.texts_per_image", "3"],
        ["--objective.negatives", "in_batch_hard"],
        ["--objective.itc_weight", "0.1", "--data.texts_per_image", "2"],
        ["--model.behaviour", "released", "--model.text.dropout", "0.1"],
    ],
    ids=lambda words: "-".join(word for word in words if not word.startswith("--")),
)
def test_every_task_and_objective_can_be_planned(words: list[str]) -> None:
    config = parse_command_line([*TINY, *words]).config
    found = counted(valueless(config, VOCABULARY, "bf16"), config, 4, 12.0)
    assert found.flops > 0 and found.activations.peak > found.activations.kept > 0
    assert found.samples == 4


def test_a_batch_that_is_not_known_before_is_refused(capsys: pytest.CaptureFixture) -> None:
    words = ("--task.name", "captioning", "--task.self_critical", "true")
    code, _, err = plan(capsys, "--gpus", "8", "--gpu-memory", "80", *words)
    assert (code, err.count("\n")) == (2, 1)
    assert "plan --task.self_critical false" in err


def test_options_are_those_of_the_program() -> None:
    from pipeline.plan import machine_of, parser

    options = parser().parse_args(["--gpus", "8", "--gpu-memory", "80", "--network-bandwidth", "12.5"])
    assert isinstance(options, argparse.Namespace)
    assert machine_of(options).network_bandwidth == 12.5e9
