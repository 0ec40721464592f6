"""docs/how_do_i.md: its commands parse, what it names is there, and its examples of a corpus and an objective run."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks.speedrun.options import parse as parse_speedrun
from data_prep.__main__ import build_parser
from data_prep.manifest import find_manifests
from model import config as model_config
from model.build import build_objective
from model.objectives.table import OBJECTIVES
from pipeline.config.command_line import parse_command_line
from pipeline.config.dry_run_options import take_dry_run
from tests.tiny_flm import MAX_TEXT_LENGTH, VOCABULARY, caption, images, pair_rows, tiny_config

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "how_do_i.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = [shlex.split(line) for language, block in BLOCKS if language == "bash" for line in block.splitlines()]
TRAINING = [words[words.index("pipeline/train.py") + 1 :] for words in COMMANDS if "pipeline/train.py" in words]
TRAINING += [words[2:] for words in COMMANDS if "slurm/pretrain_flm.sh" in words]


def modules(package: str) -> list[list[str]]:
    """The words of commands ``python -m PACKAGE...`` from the module on."""
    return [words[2:] for words in COMMANDS if words[:2] == ["python", "-m"] and words[2].startswith(package)]


def test_every_command_is_of_a_kind_that_is_looked_at() -> None:
    others = {("pip", "install")}
    seen = len(TRAINING) + sum(len(modules(name)) for name in ("data_prep", "pipeline.", "benchmarks."))
    assert len(COMMANDS) == seen + sum(tuple(words[:2]) in others for words in COMMANDS)


@pytest.mark.parametrize("words", modules("data_prep"), ids=" ".join)
def test_commands_that_prepare_data_parse(words: list[str]) -> None:
    assert build_parser().parse_args(words[1:]).verb == words[1]


@pytest.mark.parametrize("words", TRAINING, ids=" ".join)
def test_commands_that_train_parse(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe my.yaml is the one that the page shows."""
    (recipe,) = [block for language, block in BLOCKS if language == "yaml"]
    (tmp_path / "my.yaml").write_text(recipe)
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    monkeypatch.chdir(tmp_path)
    launch = parse_command_line(take_dry_run(words)[1])
    if "my.yaml" in words:
        assert (launch.config.train.steps, launch.config.optim.learning_rate) == (20000, 5e-4)


@pytest.mark.parametrize("words", modules("pipeline.") + modules("benchmarks."), ids=" ".join)
def test_programs_that_are_named_are_there(words: list[str]) -> None:
    assert importlib.util.find_spec(words[0]) is not None
    if words[0] == "benchmarks.speedrun":
        assert parse_speedrun(words[1:], "").budget


def test_files_that_are_named_are_there() -> None:
    named = {name for name in re.findall(r"`((?:\w+/)+\w+\.\w+)`", TEXT) if not name.startswith(("runs/", "RUN/"))}
    assert named and not [name for name in named if not (ROOT / name).is_file()]
    linked = set(re.findall(r"\]\(([\w.]+\.md)\)", TEXT))
    assert linked and not [name for name in linked if not (ROOT / "docs" / name).is_file()]


def example(name: str) -> dict[str, Any]:
    """The names that the Python block defines which defines this one."""
    (source,) = [block for language, block in BLOCKS if language == "python" and f"def {name}(" in block]
    defined: dict[str, Any] = {"__name__": __name__}
    exec(compile(source, name, "exec", dont_inherit=True), defined)
    return defined


def test_the_corpus_of_the_page_is_prepared(tmp_path: Path) -> None:
    (tmp_path / "pictures" / "a").mkdir(parents=True)
    for number in (1, 2):
        Image.new("RGB", (64, 48), (90 * number, 40, 40)).save(tmp_path / "pictures" / "a" / f"{number}.png")
    rows = [{"picture": f"a/{number}.png", "says": f"greetings number {number}"} for number in (1, 2, 3)]
    (tmp_path / "postcards.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    defined = example("run_postcards")
    parser = argparse.ArgumentParser()
    defined["add_postcards"](parser)
    words = ["--input", "postcards.jsonl", "--images", "pictures", "--output", "corpus", "--workers", "1"]
    words = [str(tmp_path / word) if word in ("postcards.jsonl", "pictures", "corpus") else word for word in words]
    arguments = parser.parse_args(words)
    arguments.verb = "postcards"
    assert defined["run_postcards"](arguments) == 0
    ((_, manifest),) = find_manifests(tmp_path / "corpus", "train")
    assert (manifest.samples, manifest.rows, manifest.rejected) == (2, 2, {"missing_image": 1})


def test_the_objective_of_the_page_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of k words it is told floor(0.4 k), at least one is predicted, and `</s>`."""
    defined = example("completion")
    monkeypatch.setitem(OBJECTIVES, "completion", defined["completion"])
    monkeypatch.setitem(model_config.OPTIONS_OF, "completion", defined["CompletionOptions"])
    options = model_config.objective_options("completion", known_share=0.4, itm_weight=0.0)
    options.check()
    torch.manual_seed(0)
    objective = build_objective(tiny_config(), options, VOCABULARY, MAX_TEXT_LENGTH)
    lengths = (1, 5, 9)
    batch = objective.planner(images(3), pair_rows([caption(number, seed=number) for number in lengths]))
    expected = sum(number + 1 - int(0.4 * number) for number in lengths)
    assert len(batch.terms["completion"].position) == expected
    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = objective(batch)["completion"] / expected
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    with pytest.raises(ValueError, match="known_share is 1.5"):
        model_config.objective_options("completion", known_share=1.5).check()
