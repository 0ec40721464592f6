"""The help of the training program, and what it says to options that are called otherwise elsewhere."""

from __future__ import annotations

import re

import pytest
import yaml

from pipeline.config.command_line import DEFAULT_RECIPE, parse_command_line
from pipeline.config.dry_run_options import DRY_RUN_OPTIONS
from pipeline.config.mistakes import option_types
from pipeline.config.options import ConfigError, flatten
from pipeline.config.other_names import OPTIONS, WAYS
from pipeline.config.recipes import recipe_names


def test_every_option_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_command_line(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    options, undocumented = option_types(), []
    assert {"objective.corruption_rate", "objective.mask_rate", "objective.prefix_share"} < set(options)
    flat = " ".join(text.split())
    for option in options:
        description = flat.split(f"--{option} ", 1)[1].split("(type:", 1)[0]
        if len(description.split()) < 3:
            undocumented.append(option)
    assert not undocumented
    assert all(name in text for name in ["--deepspeed", "--recipe", "--data DIR", "--output", *recipe_names()])
    assert all(line in text for line in ("deepspeed --num_gpus 2 pipeline/train.py", "--dry-run", "docs/recipes.md"))
    for name, option in (("flm", "corruption_rate"), ("mlm", "mask_rate"), ("prefixlm", "prefix_share")):
        group = flat.split(f"Options of objective.name {name}:", 1)[1].split("Options of", 1)[0]
        assert f"--objective.{option} " in group and "--objective.itm_weight" not in group


@pytest.mark.parametrize("recipe", [DEFAULT_RECIPE, "demo", "vqav2"])
def test_help_shows_each_default_once_and_as_it_is_in_force(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_command_line(["--help"] if recipe == DEFAULT_RECIPE else ["--recipe", recipe, "--help"])
    flat = " ".join(capsys.readouterr().out.split())
    assert flat.count(f"(default: {recipe})") == 1
    for option, value in flatten(parse_command_line(["--recipe", recipe]).config):
        about = r"(?:(?! --[a-z]+\.[a-z]).)*?"
        entries = re.findall(rf" --{re.escape(option)} {about}\(type: .*?, default: (.*?)\)(?= |$)", flat)
        assert len(entries) == 1, option
        shown = yaml.safe_load(entries[0])
        shown = float(shown) if isinstance(value, float) else shown  # 5e-06 is a text to YAML 1.1
        assert shown in ([list(value), str(value)] if isinstance(value, tuple) else [value]), option


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("--optim.lr_mult_tower", "did you mean --optim.lr_mult_vision?"),
        ("--optim.vision_lr", "did you mean --optim.lr_mult_vision?"),
        ("--objective.flm_weight", "weigh the others against it, like --objective.itm_weight"),
        ("--optim.warmup_steps", "--optim.warmup_fraction"),
        ("--gradient_accumulation_steps", "--optim.micro_batch_size"),
        ("--num_gpus", "deepspeed --num_gpus N pipeline/train.py"),
        ("--bf16", "did you mean --train.precision?"),
        ("--seed", "did you mean --train.seed?"),
        ("--resume", "did you mean --output?"),
        ("--dryrun", "did you mean --dry-run?"),
        ("--model.weight", "did you mean --model.weights?"),
    ],
)
def test_what_an_option_is_called_elsewhere(word: str, hint: str) -> None:
    with pytest.raises(ConfigError, match="unknown option") as refused:
        parse_command_line([word, "1"])
    assert hint in str(refused.value)


def test_every_hint_names_an_option_that_there_is() -> None:
    known = {*option_types(), "output", "recipe", *DRY_RUN_OPTIONS}
    assert set(OPTIONS.values()) <= known
    named = {name for way in WAYS.values() for name in re.findall(r"--([a-z]+\.[a-z_]+)", way)}
    assert named and named <= known
