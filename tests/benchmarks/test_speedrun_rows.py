"""Rows of a speedrun: those that come along can be trained, and what can't be is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.speedrun.rows import FOLDER, check_models, load_rows, with_packaged_weights
from model.config import Vocabulary
from pipeline.config.options import ConfigError
from pipeline.data.tokenizer import tokenizer_of
from tests.tiny_frozen_parts import write_language_model

DEMO = ["--recipe", "demo"]


def evlgen_words(folder: Path) -> list[str]:
    """Options of an EVLGen whose tower gives 7 x 7 tokens, as that of the recipe photos_evlgen, and a class token."""
    words = ["--recipe", "evlgen_tiny", "--model.language.name", str(write_language_model(folder / "llm"))]
    words += ["--model.vision.image_size", "56", "--model.connector.num_tokens", "30"]
    return [*words, "--model.connector.max_positions", "64"]


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_rows_that_come_along_are_lawful(path: Path, tmp_path: Path) -> None:
    of_connectors = path.stem == "connectors"
    rows = load_rows(path.stem, evlgen_words(tmp_path) if of_connectors else DEMO)
    check_models(rows, tokenizer_of(rows[0].config).vocabulary if of_connectors else Vocabulary(400, 0, 1, 2, 3))
    if of_connectors:
        begun = [one.name for one in rows if one.config.model.connector.pretrained or one.config.model.weights]
        assert begun == [one.name for one in rows[-3:]]  # as the file says
        sizes = {one.name: one.config.model.connector.num_tokens for one in rows}
        assert set(sizes.values()) == {30, 15, 49} and sizes["pooling"] == 30
    assert len({repr(one.options) + str(one.budget_share) for one in rows}) == len(rows) >= 4
    if path.stem == "objectives":
        assert {one.config.objective.name for one in rows} == {"flm", "mlm", "ar", "prefixlm"}
        assert {one.name: one.budget_share for one in rows}["flm_at_40_percent"] == 0.4
        masked = [one.config.objective for one in rows if one.config.objective.name == "mlm"]
        assert [(one.mask_rate, one.prediction_rate) for one in masked] == [(0.15, None), (0.4, None), (0.4, 1.0)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flm: {objective.nmae: flm}", "row flm: unknown option --objective.nmae; did you mean --objective.name"),
        ("flm: {objective.name: flan}", "row flm: objective.name: found 'flan', expected one of flm, mlm"),
        ("r: {objective.name: mlm, objective.mask_rate: 1.5}", "row r: objective.mask_rate is 1.5, expected above 0"),
        ("r: {objective.name: ar, objective.mask_rate: 0.3}", "objective ar has no mask_rate (an option of mlm)"),
        ("flm: {train.steps: 7}", "row flm: train.steps is set by the budget"),
        ("flm: {data: {paths: [x]}}", "data.paths is set by --data"),
        ("flm: {budget_share: 1.5}", "budget_share: found 1.5, expected a number above 0, at most 1"),
        ("a: {objective.name: ar}\na: {objective.name: mlm}", "a stands there twice (again in line 2)"),
        ("a:\n  objective.name: ar\n  objective.name: mlm", "a.objective.name stands there twice (again in line 3)"),
        ("a/b: {objective.name: ar}", "row name 'a/b'"),
        ("- flm", "found a list"),
        ("flm: 3", "expected rows"),
        ("flm: {", "not a YAML file"),
    ],
)
def test_rows_that_cannot_be_trained_are_refused(tmp_path: Path, text: str, expected: str) -> None:
    """Invariant 9."""
    path = tmp_path / "rows.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_rows(str(path), DEMO)
    assert expected in str(error.value)


def test_sizes_that_the_model_refuses_name_the_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.yaml"
    path.write_text("fine: {objective.name: ar}\nbad: {objective.name: mlm, model.text.heads: 5}")
    with pytest.raises(ConfigError, match=r"row bad: model.text.width 64 is not a multiple of model.text.heads 5"):
        check_models(load_rows(str(path), DEMO), Vocabulary(400, 0, 1, 2, 3))
    assert [one.name for one in load_rows(str(path), DEMO, only=["bad"])] == ["bad"]
    with pytest.raises(ConfigError, match="--only: found 'worse', expected rows of rows.yaml: fine, bad"):
        load_rows(str(path), DEMO, only=["worse"])
    with pytest.raises(ConfigError, match="--rows: found no file for 'none'.*ablations"):
        load_rows("none", DEMO)


@pytest.mark.parametrize("option", ["model.weights", "model.vision.pretrained", "model.text.pretrained"])
def test_what_rows_begin_with_is_looked_for_before_anything_trains(tmp_path: Path, option: str) -> None:
    run, path = tmp_path / "run", tmp_path / "rows.yaml"
    path.write_text(f"begun: {{objective.name: ar, {option}: {run}}}")
    rows = load_rows(str(path), DEMO)
    with pytest.raises(ConfigError, match=f"row begun: {option}: found no {run}; make it"):
        with_packaged_weights(rows)
    run.mkdir()
    assert with_packaged_weights(rows)[0].config == rows[0].config
