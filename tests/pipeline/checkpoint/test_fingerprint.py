"""What a run must share with its first part: named when it differs, refused unless allowed, blind to speed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.record import Record
from pipeline.checkpoint.fingerprint import accept, run_fingerprint
from pipeline.config.options import Config, ConfigError
from pipeline.loading.open_data import data_fingerprint, open_training_data
from tests.pipeline.data.test_reader import records, write_split
from tests.pipeline.data.test_tokenizer import write_tokenizer
from tests.program.test_program import SHORT, finish, losses, program, work  # noqa: F401 (a fixture)


def fingerprint_of(folder: Path, change: Callable[[Config], None] = lambda config: None) -> dict:
    config = Config()
    config.data.paths, config.optim.batch_size = [str(folder)], 4
    change(config)
    return run_fingerprint(config, data_fingerprint(config, open_training_data(config)))


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
        ("objective.negatives", "in_batch_hard", "objective.negatives None -> in_batch_hard"),
    ],
)
def test_another_model_or_batch_is_never_accepted(folder: Path, name: str, value: object, named: str) -> None:
    for allowed in (False, True):
        with pytest.raises(ConfigError, match=named) as caught:
            accept(Path("RUN"), fingerprint_of(folder), fingerprint_of(folder, setting(name, value)), allowed)
        assert "allow_change" not in str(caught.value) and "another --output" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("data.shuffle", "blocks", "data.order.shuffle full -> blocks of 1024 rows"),
        ("train.seed", 1, "data.order.seed 2022 -> 1"),
        ("data.max_text_length", 20, "data.max_text_length 50 -> 20"),
        ("data.fast_decode", False, "data.images.fast_decode True -> False"),
        ("data.max_pixels", 10**6, "data.images.max_pixels"),
    ],
)
def test_other_data_is_named_and_accepted_when_allowed(folder: Path, name: str, value: object, named: str) -> None:
    saved, wanted = fingerprint_of(folder), fingerprint_of(folder, setting(name, value))
    with pytest.raises(ConfigError, match=f"RUN holds a run with another {named}.*--data.allow_change true"):
        accept(Path("RUN"), saved, wanted, allow_change=False)
    (change,) = accept(Path("RUN"), saved, wanted, allow_change=True).items()
    assert " ".join(change).startswith(named)


def test_what_is_about_speed_or_place_is_no_difference(folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    saved = json.loads(json.dumps(fingerprint_of(folder)))
    assert accept(Path("RUN"), saved, fingerprint_of(moved), allow_change=False) == {}
    for name, value in (("data.num_workers", 9), ("train.steps", 7), ("optim.micro_batch_size", 2)):
        assert accept(Path("RUN"), saved, fingerprint_of(folder, setting(name, value)), allow_change=False) == {}


def test_the_micro_batch_counts_where_negatives_come_from_it(folder: Path) -> None:
    """Invariant 2. Runs begun before there was a choice have nothing in their fingerprint, and go on."""

    def hard(config: Config, size: int = 64) -> None:
        config.objective.negatives, config.optim.micro_batch_size = "in_batch_hard", size

    saved = fingerprint_of(folder, hard)
    assert accept(Path("RUN"), saved, fingerprint_of(folder, hard), allow_change=False) == {}
    with pytest.raises(ConfigError, match="another optim.micro_batch_size 64 -> 2"):
        accept(Path("RUN"), saved, fingerprint_of(folder, lambda config: hard(config, 2)), allow_change=True)
    assert "negatives" not in fingerprint_of(folder)["objective"]
    assert fingerprint_of(folder)["optim"] == {"batch_size": 4}


def test_other_manifests_weights_and_tokenizers_are_named(folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    shutil.rmtree(other / "a" / "train")
    changed = [*records(9)[:-1], Record("k0008", records(1)[0].images, ("another caption",), {}, ("jpg",))]
    write_split(other / "a" / "train", changed, corpus="a")
    same_rows = accept(Path("RUN"), fingerprint_of(folder), fingerprint_of(other), allow_change=True)
    assert list(same_rows) == ["data.corpora.0 a/train.content"]

    shutil.rmtree(other / "b")
    gone = accept(Path("RUN"), fingerprint_of(folder), fingerprint_of(other), allow_change=True)
    assert gone["data.corpora.1 b/train.rows"] == "7 -> None"
    with pytest.raises(ConfigError, match="another data.corpora.0 a/train.content"):
        accept(Path("RUN"), fingerprint_of(folder), fingerprint_of(other), allow_change=False)

    def weighted(config: Config) -> None:
        config.data.paths = [f"{folder}/a:3", f"{folder}/b:1"]
        config.data.tokenizer = str(folder / "tokenizer")

    assert list(accept(Path("RUN"), fingerprint_of(folder), fingerprint_of(folder, weighted), True)) == ["data.weights"]

    vocabulary = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    vocabulary["model"]["merges"] = vocabulary["model"]["merges"][:-1]
    retrained = shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    (retrained / "tokenizer.json").write_text(json.dumps(vocabulary))
    found = accept(
        Path("RUN"), fingerprint_of(folder), fingerprint_of(folder, setting("data.tokenizer", str(retrained))), True
    )
    assert list(found) == ["data.tokenizer"] and ".. -> " in found["data.tokenizer"]


@pytest.mark.slow
def test_a_resumed_program_refuses_other_data_unless_told_otherwise(work: Path) -> None:  # noqa: F811
    run = work / "runs" / "other_data"
    options = [*SHORT, "--output", run, "--train.eval_every", "0", "--tracking.report", "false"]
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
