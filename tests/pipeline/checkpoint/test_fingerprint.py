"""What a run must share with its first part: named when it differs, refused unless allowed, blind to speed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_prep.record import Record
from model.config import FLMOptions, option
from pipeline.checkpoint.fingerprint import accept, run_fingerprint
from pipeline.config.options import Config, ConfigError
from pipeline.config.task_options import task_options
from pipeline.loading.open_data import data_fingerprint, open_training_data
from tests.pipeline.data.test_reader import records, write_split
from tests.pipeline.data.test_tokenizer import write_tokenizer
from tests.program.test_program import SHORT, finish, losses, program, work  # noqa: F401 (a fixture)

Change = Callable[[Config], None]


def config_of(folder: Path, change: Change = lambda config: None) -> Config:
    config = Config()
    config.data.paths, config.optim.batch_size = [str(folder)], 4
    change(config)
    return config


def fingerprint_of(folder: Path, change: Change = lambda config: None) -> dict:
    config = config_of(folder, change)
    return run_fingerprint(config, data_fingerprint(config, open_training_data(config)))


def resume(saved: dict, folder: Path, change: Change = lambda config: None, allow_change: bool = False) -> dict:
    """What ``accept`` says when a run with the fingerprint ``saved`` goes on with the changed configuration."""
    config = config_of(folder, change)
    config.data.allow_change = allow_change
    return accept(Path("RUN"), saved, fingerprint_of(folder, change), config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prepared")
    write_split(root / "a" / "train", records(9), corpus="a")
    write_split(root / "b" / "train", records(7), corpus="b")
    write_tokenizer(root / "tokenizer")
    return root


def setting(name: str, value: object) -> Callable[[Config], None]:
    def change(config: Config) -> None:
        *sections, last = name.split(".")
        for section in sections:
            config = getattr(config, section)
        setattr(config, last, value)

    return change


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("model.vision.image_size", 160, "model.vision.image_size"),
        ("optim.batch_size", 8, "optim.batch_size 4 -> 8"),
        ("objective.negative_share", 0.125, "objective.negative_share"),
        ("objective.negatives", "in_batch_hard", "objective.negatives corpus -> in_batch_hard"),
        ("objective.itc_weight", 0.1, "objective.itc_weight 0.0 -> 0.1"),
    ],
)
def test_another_model_or_batch_is_never_accepted(folder: Path, name: str, value: object, named: str) -> None:
    for allowed in (False, True):
        with pytest.raises(ConfigError, match=named) as caught:
            resume(fingerprint_of(folder), folder, setting(name, value), allowed)
        assert "allow_change" not in str(caught.value) and "another --output" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("data.shuffle", "blocks", "data.order.shuffle full -> blocks of 1024 rows"),
        ("train.seed", 1, "data.order.seed 2022 -> 1"),
        ("data.max_text_length", 20, "data.max_text_length 50 -> 20"),
        ("data.fast_decode", False, "data.images.fast_decode True -> False"),
        ("data.max_pixels", 10**6, "data.images.max_pixels"),
        ("data.augmentation", "randaugment", "data.images.augmentation None -> randaugment, version 1"),
    ],
)
def test_other_data_is_named_and_accepted_when_allowed(folder: Path, name: str, value: object, named: str) -> None:
    saved = fingerprint_of(folder)
    with pytest.raises(ConfigError, match=f"RUN holds a run with another {named}.*--data.allow_change true"):
        resume(saved, folder, setting(name, value))
    (change,) = resume(saved, folder, setting(name, value), allow_change=True).items()
    assert " ".join(change).startswith(named)


def test_what_is_about_speed_or_place_is_no_difference(folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    saved = json.loads(json.dumps(fingerprint_of(folder)))
    assert resume(saved, moved) == {}
    about_speed = {"data.num_workers": 9, "optim.micro_batch_size": 2, "model.activation_checkpointing": True}
    for name, value in (about_speed | {"train.steps": 7}).items():
        assert resume(saved, folder, setting(name, value)) == {}


@pytest.mark.parametrize("task", ["pretraining", "contrast", "retrieval"])
def test_the_micro_batch_counts_where_negatives_come_from_it(folder: Path, task: str) -> None:
    """Invariant 2."""

    def hard(config: Config, size: int = 64) -> None:
        config.optim.micro_batch_size = size
        if task == "retrieval":
            config.task = task_options("retrieval", negatives="in_batch")
        elif task == "contrast":
            config.objective.itc_weight = 0.1
        else:
            config.objective.negatives = "in_batch_hard"

    saved = fingerprint_of(folder, hard)
    assert resume(saved, folder, hard) == {}
    with pytest.raises(ConfigError, match="another optim.micro_batch_size 64 -> 2"):
        resume(saved, folder, lambda config: hard(config, 2), allow_change=True)
    assert fingerprint_of(folder)["optim"] == {"batch_size": 4}


def test_an_option_that_came_later_leaves_earlier_runs_resumable(folder: Path) -> None:
    """Runs begun before there were negatives of the micro-batch, towers' GELU or two objectives' own options."""
    saved = fingerprint_of(folder)
    del saved["objective"]["negatives"], saved["model"]["vision"]["quick_gelu"], saved["model"]["reconstructor"]
    del saved["data"]["images"]["augmentation"]
    assert resume(saved, folder) == {}
    with pytest.raises(ConfigError, match="another objective.negatives corpus -> in_batch_hard"):
        resume(saved, folder, setting("objective.negatives", "in_batch_hard"))
    with pytest.raises(ConfigError, match="another model.vision.quick_gelu True -> False;"):
        resume(saved, folder, setting("model.vision.quick_gelu", False))
    saved["objective"] |= {"mask_rate": 0.3, "prefix_share": None}  # of all objectives, as it once was
    assert resume(saved, folder) == {}
    saved["objective"]["forgotten"] = 3
    with pytest.raises(ConfigError, match="another objective.forgotten 3 -> None;"):
        resume(saved, folder)


def test_an_option_may_name_another_value_than_its_default_for_earlier_runs(folder: Path) -> None:
    @dataclass
    class Later(FLMOptions):
        smoothing: float = option(0.1, before=0.0)
        orders: tuple[int, ...] = (1, 2)

    def later(smoothing: float) -> Change:
        return setting("objective", Later(smoothing=smoothing))

    assert Later().smoothing == 0.1
    assert resume(fingerprint_of(folder), folder, later(0.0)) == {}
    with pytest.raises(ConfigError, match=r"another objective.smoothing 0.0 -> 0.1;"):
        resume(fingerprint_of(folder), folder, later(0.1))


def test_other_manifests_weights_and_tokenizers_are_named(folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    shutil.rmtree(other / "a" / "train")
    changed = [*records(9)[:-1], Record("k0008", records(1)[0].images, ("another caption",), {}, ("jpg",))]
    write_split(other / "a" / "train", changed, corpus="a")
    same_rows = resume(fingerprint_of(folder), other, allow_change=True)
    assert list(same_rows) == ["data.corpora.0 a/train.content"]

    shutil.rmtree(other / "b")
    gone = resume(fingerprint_of(folder), other, allow_change=True)
    assert gone["data.corpora.1 b/train.rows"] == "7 -> None"
    with pytest.raises(ConfigError, match="another data.corpora.0 a/train.content"):
        resume(fingerprint_of(folder), other)

    def weighted(config: Config) -> None:
        config.data.paths = [f"{folder}/a:3", f"{folder}/b:1"]
        config.data.tokenizer = str(folder / "tokenizer")

    assert list(resume(fingerprint_of(folder), folder, weighted, allow_change=True)) == ["data.weights"]

    vocabulary = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    vocabulary["model"]["merges"] = vocabulary["model"]["merges"][:-1]
    retrained = shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    (retrained / "tokenizer.json").write_text(json.dumps(vocabulary))
    found = resume(fingerprint_of(folder), folder, setting("data.tokenizer", str(retrained)), allow_change=True)
    assert list(found) == ["data.tokenizer"] and ".. -> " in found["data.tokenizer"]


@pytest.mark.slow
def test_a_resumed_program_refuses_other_data_unless_told_otherwise(work: Path) -> None:  # noqa: F811
    run = work / "runs" / "other_data"
    options = [*SHORT, "--output", run, "--train.eval_every", "0"]
    assert finish(program(*options, "--train.steps", "2"), work).returncode == 0
    before = losses(run)
    other = [*options, "--train.steps", "4", "--data.shuffle", "blocks"]
    refused = finish(program(*other), work)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert (
        "another data.order.shuffle full -> blocks" in refused.stderr and "--data.allow_change true" in refused.stderr
    )
    allowed = finish(program(*other, "--data.allow_change", "true"), work)
    assert allowed.returncode == 0, allowed.stderr
    assert "continuing with another data.order.shuffle: full -> blocks" in allowed.stdout
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    (noted,) = [line for line in lines if line["kind"] == "data_change"]
    assert noted["step"] == 2 and noted["data.order.shuffle"].startswith("full -> blocks of")
    state = json.loads((run / "checkpoints" / "step_00000004" / "state.json").read_text())
    assert [change["after_step"] for change in state["data_changes"]] == [2] and state["samples_seen"] == 64
    assert list(losses(run)) == [1, 2, 3, 4] and all(losses(run)[step] == before[step] for step in before)
