"""Command line, recipes and DeepSpeed JSON: precedence, sources, and one line for every mistake (invariant 9)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from model.config import FLMOptions, MLMOptions, PrefixLMOptions
from pipeline.config.command_line import DEFAULT_RECIPE, describe, load_config, parse_command_line
from pipeline.config.options import (
    Config,
    ConfigError,
    OptimConfig,
    accumulation_steps,
    save_config,
    to_plain,
    weighted_paths,
)
from pipeline.config.recipes import RECIPES, recipe_names
from pipeline.deepspeed_json.ds_config import Device, choose_precision, read_ds_config, resolve

REPOSITORY = Path(__file__).resolve().parents[3]
CPU, GPU = Device("cpu", has_bf16=True), Device("cuda", has_bf16=True)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text("base: parent.yaml\noptim: {batch_size: 32, learning_rate: 3e-4}\ndata: {paths: [x]}\n")
    (tmp_path / "parent.yaml").write_text("optim: {batch_size: 16, micro_batch_size: 4}\ntrain: {steps: 7}\n")
    return path


def test_precedence_and_sources(recipe: Path) -> None:
    launch = parse_command_line(["--recipe", str(recipe), "--optim.batch_size", "64", "--data", "a", "b:2"])
    optim = launch.config.optim
    assert (optim.batch_size, optim.micro_batch_size, optim.learning_rate) == (64, 4, 3e-4)
    assert launch.config.train.steps == 7 and launch.config.data.paths == ["a", "b:2"]
    assert launch.sources == {
        "data.paths": "command line",
        "optim.batch_size": "command line",
        "optim.micro_batch_size": "recipe mine",
        "optim.learning_rate": "recipe mine",
        "train.steps": "recipe mine",
    }
    table = describe(launch)
    assert "optim.batch_size        64" in table and "command line" in table
    assert launch.output == Path("runs/mine")


def test_steps_on_top_of_epochs_mean_the_steps(tmp_path: Path) -> None:
    for name, content in {
        "steps": "train: {steps: 7}",
        "epochs": "base: steps.yaml\ntrain: {epochs: 2.5}",
        "again": "base: epochs.yaml\ntrain: {steps: 5}",
        "both": "train: {steps: 7, epochs: 3}",
    }.items():
        (tmp_path / f"{name}.yaml").write_text(content)

    def length(name: str, *words: str) -> tuple[int, float | None]:
        train = parse_command_line(["--recipe", str(tmp_path / f"{name}.yaml"), *words]).config.train
        return train.steps, train.epochs

    assert [length(name) for name in ("steps", "epochs", "again", "both")] == [(7, None), (7, 2.5), (5, None), (7, 3)]
    assert length("epochs", "--train.steps", "9") == (9, None) and length("again", "--train.epochs", "4") == (5, 4)


def test_bare_line_is_the_paper() -> None:
    launch = parse_command_line([])
    assert launch.recipe == "flm_base_4m" and launch.output == Path("runs/flm_base_4m")
    config = launch.config
    assert (config.train.steps, config.optim.batch_size, config.model.vision.image_size) == (30_000, 4096, 288)
    assert (config.optim.learning_rate, config.optim.lr_mult_head, config.optim.lr_mult_cross) == (8e-5, 5, 5)
    assert config.optim.clip_grad_norm == 0 and config.data.paths == ["data"]


def test_config_survives_its_file(tmp_path: Path, recipe: Path) -> None:
    config = parse_command_line(["--recipe", str(recipe), "--train.eval_samples", "null"]).config
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path) == config


def test_a_frozen_tower_has_no_multiplier() -> None:
    frozen = ["--model.vision.frozen", "true", "--model.vision.pretrained", "openai"]
    with pytest.raises(ConfigError, match="optim.lr_mult_vision 0.1 does nothing where model.vision.frozen is true"):
        parse_command_line([*frozen, "--optim.lr_mult_vision", "0.1"])
    assert parse_command_line(["--optim.lr_mult_vision", "0.1"]).config.optim.lr_mult_vision == 0.1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--optim.batchsize", "3"], "unknown option --optim.batchsize; did you mean --optim.batch_size?"),
        (["--batch_size=3"], "unknown option --batch_size; did you mean --optim.batch_size?"),
        (["--optim.batch_size", "x"], "optim.batch_size: found 'x', expected a whole number above 0"),
        (["--optim.batch_size=0"], "optim.batch_size: found '0', expected a whole number above 0"),
        (["--optim.schedule", "lin"], "optim.schedule: found 'lin', expected one of linear, cosine, constant"),
        (["--optim.betas", "[.9, 2]"], "optim.betas: found '[.9, 2]', expected a list of 2, each a number from 0 to 1"),
        (["--optim.betas", "[.9, 1]"], "expected two numbers below 1"),
        (["--train.compile", "maybe"], "train.compile: found 'maybe', expected true or false"),
        (["--train.steps"], "train.steps: found nothing, expected a whole number above 0"),
        (["--train.eval_samples=-2"], "expected a whole number above 0 or null"),
        (["--model.vision", "{}"], "unknown option --model.vision; did you mean --model.vision.name?"),
        (["--data"], "--data names no folder"),
        (["stray"], "found 'stray' where an option was expected"),
        (["--recipe", "flm_bas_4m"], "no recipe named 'flm_bas_4m'; did you mean flm_base_4m?"),
        (["--recipe", "nowhere.yaml"], "no file nowhere.yaml"),
        (["--deepspeed", "nowhere.json"], "--deepspeed: no file nowhere.json"),
        (["--optim.lr", "1"], "unknown option --optim.lr; did you mean --optim.learning_rate?"),
        (["--lr", "1"], "did you mean --optim.learning_rate?"),
        (["--optim.learning_rate", "inf"], "optim.learning_rate: found inf, expected a finite number"),
        (["--optim.weight_decay=inf"], "optim.weight_decay: found inf, expected a finite number"),
        (["--train.patience", "2"], "needs a held-out value that must get better; name it by --train.keep_best"),
        (["--train.patience=2", "--train.keep_best=loss", "--train.eval_every=0"], "train.eval_every 0 makes none"),
        (["--train.epochs", "inf"], "train.epochs: found inf, expected a finite number"),
        (["--train.epochs", "0"], "train.epochs: found '0', expected a number above 0 or null"),
        (["--output", "s3://bucket/run"], "--output s3://bucket/run: found an address, expected a folder"),
        (["--output", "README.md"], "--output README.md: README.md is a file, expected a folder"),
        (["--output", "README.md/run"], "README.md is a file, expected a folder"),
        (["--data.max_text_length", "600"], "use --data.max_text_length 512"),
        (["--data.max_text_length", "2"], "expected at least 3"),
        (["--objective.mask_rate", "1.5", "--objective.name=mlm"], "objective.mask_rate is 1.5, expected above 0"),
        (["--objective.name", "flan"], "objective.name: found 'flan', expected one of flm, mlm, ar, prefixlm"),
        (["--objective.mask_rate", "0.3"], "objective flm has no mask_rate (an option of mlm)"),
        (
            ["--objective.name", "mlm", "--objective.corruption_rate", "0.3", "--recipe", "demo"],
            "command line: objective mlm has no corruption_rate (an option of flm); leave it out, or choose "
            "objective.name flm",
        ),
    ],
)
def test_command_line_mistakes(arguments: list[str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(ConfigError) as refused:
        parse_command_line(arguments)
    assert expected in str(refused.value) and "\n" not in str(refused.value)


# Each line lists the one before nine times: a billion values in 600 bytes.
NINE_TIMES_NINE = "\n".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("optim: {batchsize: 3}", "unknown option optim.batchsize; did you mean optim.batch_size?"),
        ("optim: {batch_size: many}", "optim.batch_size: found 'many', expected a whole number above 0"),
        ("optim: {batch_size: null}", "optim.batch_size: found null, expected a whole number above 0"),
        ("optim: 3", "unknown option optim"),
        ("base: bad.yaml", "its own base"),
        ("base: nothing_like_it", "no recipe named 'nothing_like_it'"),
        ("a: [", "not a YAML file"),
        ("[1]", "found a list"),
        ("optim: {lr: 2026-99-99}", "not a YAML file"),
        pytest.param("a: " + "[" * 5000, "not a YAML file", id="deep"),
        ("a: &a {b: *a}", "anchors stand for more than 100000 values"),
        pytest.param("a: &a [1]\n" + NINE_TIMES_NINE, "anchors stand for more than 100000 values", id="anchors"),
        ("!!python/object/apply:os.system ['touch crater']", "not a YAML file"),
        ("objective: {mask_rate: 0.3}", "bad.yaml: objective flm has no mask_rate (an option of mlm)"),
        ("objective: {name: ar, prefix_share: 0.3}", "objective ar has no prefix_share (an option of prefixlm)"),
        ("base: demo\nobjective: {name: mlm, corruption_rate: 0.3}", "objective mlm has no corruption_rate"),
        ("optim: {batch_size: 4}\ntrain: {steps: 3}\noptim: {eps: 1e-3}", "optim stands there twice (again in line 3)"),
        ("optim:\n  eps: 1e-3\n  eps: 1e-3", "bad.yaml: optim.eps stands there twice (again in line 3)"),
        ("optim.eps: 1e-3\noptim: {eps: 1e-4}", "optim.eps stands there twice (again in line 2)"),
    ],
)
def test_recipe_mistakes(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as refused:
        parse_command_line(["--recipe", str(path)])
    assert expected in str(refused.value) and "\n" not in str(refused.value)


def test_options_of_an_objective_that_another_one_replaces_are_not_used_and_said(tmp_path: Path) -> None:
    launch = parse_command_line(["--recipe", "demo", "--objective.name", "mlm", "--objective.mask_rate", "0.3"])
    assert launch.config.objective == MLMOptions(mask_rate=0.3)
    assert launch.config.model.vision.image_size == 64, "the rest of the recipe stays"
    assert launch.idle == {"objective.corruption_rate": "demo"}
    assert "objective.corruption_rate of recipe demo is not used: mlm has no such option" in describe(launch)
    assert parse_command_line(["--recipe", "demo"]).config.objective == FLMOptions(corruption_rate=0.5)

    (tmp_path / "mine.yaml").write_text("base: demo\nobjective: {name: prefixlm, itm_weight: 0.2, prefix_share: 0.5}")
    launch = parse_command_line(["--recipe", str(tmp_path / "mine.yaml")])
    assert launch.config.objective == PrefixLMOptions(itm_weight=0.2, prefix_share=0.5)
    assert launch.idle == {"objective.corruption_rate": "demo"}
    assert launch.sources["objective.name"] == "recipe mine"
    back = ["--objective.name", "flm", "--objective.corruption_rate", "0.4"]
    launch = parse_command_line(["--recipe", str(tmp_path / "mine.yaml"), *back])
    assert launch.config.objective == FLMOptions(itm_weight=0.2, corruption_rate=0.4)
    assert launch.idle == {"objective.prefix_share": "mine"}


def test_the_settings_of_a_run_that_wrote_down_all_objectives_options(tmp_path: Path) -> None:
    """Runs did before each objective had options of its own."""
    text = "objective: {name: mlm, corruption_rate: 0.4, span_placement: centred, mask_rate: 0.2, prefix_share: null}"
    (tmp_path / "config.yaml").write_text(text)
    assert load_config(tmp_path).objective == MLMOptions(mask_rate=0.2)
    assert parse_command_line(["--recipe", str(tmp_path / "config.yaml")]).config.objective == MLMOptions(mask_rate=0.2)
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError, match="objective mlm has no corruption_rate"):
        parse_command_line(["--recipe", str(tmp_path / "recipe.yaml")])


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_parse_and_say_how_to_run_them(name: str) -> None:
    parse_command_line(["--recipe", name])
    text = (RECIPES / f"{name}.yaml").read_text()
    assert text.startswith("# ") and f"--recipe {name}" in text or name == DEFAULT_RECIPE
    assert "pipeline/train.py" in text


def test_mistakes_are_found_before_torch_is_loaded() -> None:
    program = (
        "import sys; from pipeline.config.command_line import parse_command_line; parse_command_line([]);"
        "heavy = {'torch', 'deepspeed', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True, timeout=60)


@pytest.mark.parametrize(
    ("batch", "micro", "world", "accumulation"), [(4096, 64, 8, 8), (4096, 64, 1, 64), (6, 1, 3, 2)]
)
def test_effective_batch_stays(batch: int, micro: int, world: int, accumulation: int) -> None:
    assert accumulation_steps(OptimConfig(batch_size=batch, micro_batch_size=micro), world) == accumulation


@pytest.mark.parametrize(
    ("batch", "micro", "world", "fix"),
    [
        (16, 64, 1, "--optim.micro_batch_size 16"),
        (100, 64, 2, "--optim.micro_batch_size 50"),
        (64, 6, 1, "--optim.micro_batch_size 4"),
        (64, 8, 3, "--optim.batch_size 63"),
        (2, 1, 4, "--optim.batch_size 4"),
    ],
)
def test_contradicting_batch_sizes(batch: int, micro: int, world: int, fix: str) -> None:
    """Invariant 9; the proposed fix works."""
    optim = OptimConfig(batch_size=batch, micro_batch_size=micro)
    with pytest.raises(ConfigError, match=f"optim.batch_size {batch} .* use {fix}"):
        accumulation_steps(optim, world)
    option, value = fix.split()
    setattr(optim, option.removeprefix("--optim."), int(value))
    if option == "--optim.micro_batch_size":
        accumulation_steps(optim, world)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_shipped_ds_configs_leave_nothing_open(path: Path) -> None:
    config = Config()
    resolved = resolve(read_ds_config(path), config, 8, GPU)
    assert "auto" not in json.dumps(resolved)
    assert resolved["train_batch_size"] == 4096 and resolved["train_micro_batch_size_per_gpu"] == 64
    assert resolved["gradient_accumulation_steps"] == 8 and resolved["gradient_clipping"] == 0
    assert resolved["zero_optimization"]["stage"] == int(path.stem[4])


@pytest.mark.parametrize(
    ("given", "wanted", "stage", "device", "expected"),
    [
        ({}, "auto", 2, GPU, "bf16"),
        ({}, "auto", 0, GPU, "fp32"),
        ({}, "auto", 2, CPU, "fp32"),
        ({}, "auto", 2, Device("cuda", has_bf16=False), "fp32"),
        ({}, "bf16", 2, CPU, "bf16"),
        ({}, "fp16", 1, GPU, "fp16"),
        ({"bf16": {"enabled": True}}, "auto", 2, CPU, "bf16"),
        ({"bf16": {"enabled": False}, "fp16": {"enabled": False}}, "auto", 2, GPU, "fp32"),
    ],
)
def test_precision(given: dict, wanted: str, stage: int, device: Device, expected: str) -> None:
    assert choose_precision(given, wanted, stage, device) == expected


@pytest.mark.parametrize(
    ("change", "options", "expected"),
    [
        ({}, {"train.precision": "fp16"}, "fp16 cannot train on a CPU; use --train.precision bf16 or fp32"),
        (
            {"fp16": {"enabled": True}},
            {},
            'write "auto" as fp16.enabled in the DeepSpeed JSON and use --train.precision',
        ),
        ({"steps_per_print": "auto", "zero_force_ds_cpu_optimizer": "auto"}, {}, "print, zero_force_ds_cpu_optimizer;"),
        ({"zero_optimization": {"stage": 0}}, {"train.precision": "bf16"}, "use ds_configs/zero1.json"),
        ({"zero_optimization": {"stage": 4}}, {}, "stage: found 4, expected 0, 1, 2 or 3"),
        ({"bf16": {"enabled": True}}, {"train.precision": "fp32"}, "train.precision is fp32 but the DeepSpeed JSON"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, {}, "bf16 and fp16 are both enabled"),
        ({"train_batch_size": 9}, {}, "train_batch_size is 9 but optim.batch_size gives 4096"),
        ({"gradient_accumulation_steps": 3}, {}, "gradient_accumulation_steps is 3"),
        ({"gradient_clipping": 1.0}, {}, "gradient_clipping is 1.0 but optim.clip_grad_norm gives 0"),
        ({"optimizer": {"type": "Lamb"}}, {}, "only AdamW is supported"),
        ({"optimizer": {"params": {"lr": 1}}}, {}, "optimizer.params.lr is 1 but optim.learning_rate is 8e-05"),
        ({"optimizer": {"params": {"momentum": 1}}}, {}, "unknown optimizer.params.momentum"),
        ({"scheduler": {"type": "WarmupLR"}}, {}, "use optim.schedule"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, {}, "nvme is not supported"),
        ({"steps_per_print": "auto"}, {}, "the recipe does not own steps_per_print"),
    ],
)
def test_ds_config_mistakes(change: dict, options: dict[str, str], expected: str) -> None:
    given = read_ds_config(REPOSITORY / "ds_configs" / "zero2.json") | change
    config = parse_command_line([f"--{name}={value}" for name, value in options.items()]).config
    with pytest.raises(ConfigError) as refused:
        resolve(given, config, 1, CPU)
    assert expected in str(refused.value)


def test_ds_config_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ConfigError, match="not a readable JSON file"):
        read_ds_config(tmp_path / "a.json")
    (tmp_path / "b.json").write_text('{"bf16": {"enabled": true, "enabled": false}}')
    with pytest.raises(ConfigError, match=r"b.json: enabled stands there twice; remove one"):
        read_ds_config(tmp_path / "b.json")


def test_addresses_have_weights_as_folders_have() -> None:
    entries = ["s3://bucket/corpus", "s3://bucket/corpus:2", "https://host:8000", "http://host:8000/a:0.5", "file:///a"]
    config = parse_command_line(["--data", *entries]).config.data
    found = [(str(path), type(path).__name__.removeprefix("Posix"), weight) for path, weight in weighted_paths(config)]
    assert found == [
        ("s3://bucket/corpus", "Address", None),
        ("s3://bucket/corpus", "Address", 2.0),
        ("https://host:8000", "Address", None),
        ("http://host:8000/a", "Address", 0.5),
        ("/a", "Path", None),
    ]
    with pytest.raises(ValueError, match="no address of a store"):
        weighted_paths(parse_command_line(["--data", "simplecache::s3://bucket/corpus"]).config.data)


def test_plain_values_only() -> None:
    config = parse_command_line(["--optim.batch_size", "8"]).config
    assert type(to_plain(config)["optim"]["batch_size"]) is int


@pytest.mark.parametrize("task", ["vqa", "nlvr2", "snli_ve"])
def test_an_option_that_several_tasks_have_is_of_each(task: str) -> None:
    launch = parse_command_line(["--task.name", task, "--task.images", "hidden"])
    assert (launch.config.task.name, launch.config.task.images) == (task, "hidden")


def test_an_option_of_several_tasks_is_refused_for_another() -> None:
    with pytest.raises(
        ConfigError, match=r"task captioning has no images \(an option of vqa, gqa, okvqa, nlvr2, snli_ve\)"
    ):
        parse_command_line(["--task.name", "captioning", "--task.images", "hidden"])
