"""What the evaluation program is told and refuses, each mistake in one line; test splits and submissions."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_prep.drawn.synth import SynthOptions, write_corpora
from data_prep.tokenizer import train_tokenizer
from data_prep.vqa_answers import vocabulary_file
from pipeline import evaluate
from pipeline.data.tokenizer import load_tokenizer
from pipeline.finetuning.table import task_of
from tests.pipeline.data.test_reader import write_split
from tests.pipeline.finetuning.test_classification import ANSWERS, vqa_record
from tests.written_run import TINY, write_run

SETTINGS = TINY.replace("max_text_length", "num_workers: 0, max_text_length")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``data``: synth, and questions; ``run`` pretrains, ``vqa`` answers, with its own copy of the list of answers."""
    folder = tmp_path_factory.mktemp("runs")
    data = folder / "data"
    sizes = {"train": 30, "dev": 6, "test": 4}
    write_corpora(data / "synth", SynthOptions(sizes, image_size=32, pair_share=0))
    train_tokenizer([data / "synth" / "train"], data / "tokenizer", 300)
    records = [vqa_record(number) for number in range(6)]
    for split in ("train", "dev", "test"):
        write_split(data / "asked" / split, records)
    (data / "answers.json").write_text(json.dumps(vocabulary_file([(answer, 9) for answer in ANSWERS], ["train"])))
    trained = {"tokenizer": load_tokenizer(data / "tokenizer").fingerprint}
    write_run(folder / "run", data / "synth", SETTINGS, fingerprint={"data": trained})
    shutil.copytree(data / "tokenizer", folder / "run" / "tokenizer")
    settings = SETTINGS + "task: {{name: vqa}}\n"
    write_run(folder / "vqa", data / "asked", settings, fingerprint={"data": trained | answers_of(data)})
    shutil.copy(data / "answers.json", folder / "vqa")
    return folder


def answers_of(data: Path) -> dict[str, Any]:
    from pipeline.config.options import Config
    from pipeline.config.task_options import task_options

    config = Config(task=task_options("vqa"))
    config.data.paths = [str(data)]
    return task_of(config).fingerprint(config)


def said(capsys: pytest.CaptureFixture, *words: str | Path) -> str:
    """The one line by which the program refuses something."""
    capsys.readouterr()
    assert evaluate.main([str(word) for word in words]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1, line
    return line


def scored(capsys: pytest.CaptureFixture, *words: str | Path) -> tuple[dict[str, float], dict[str, Any], str, Path]:
    """Values, scorecard, what was said besides, and the folder."""
    capsys.readouterr()
    assert evaluate.main([str(word) for word in words]) == 0
    out = capsys.readouterr()
    card = Path(re.search(r"^scorecard: (.*)$", out.err, re.MULTILINE)[1])
    return json.loads(out.out), json.loads(card.read_text()), out.err, card.parent


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--task.decoding", "beam"], "pretraining has no decoding"),
        (["--optim.learning_rate", "1"], "--optim.learning_rate: .*config.yaml says what was trained"),
        (["--data.eval_splitt", "dev"], "unknown option --data.eval_splitt; did you mean --data.eval_split"),
        (["--task", "cooking"], "task.name: found 'cooking', expected one of pretraining, vqa"),
        (["--task", "nlvr2"], "image"),
        (["--split", "validation"], "no split 'validation' in .*give --data or --split"),
        (["--submission"], "the task pretraining has no official results file"),
        (["more"], "found 'more' where an option was expected"),
        (["--device", "abacus"], "--device abacus: not usable here"),
    ],
)
def test_mistakes_are_refused_in_one_line(
    runs: Path, capsys: pytest.CaptureFixture, tmp_path: Path, words: list[str], expected: str
) -> None:
    assert re.search(expected, said(capsys, "--run", runs / "run", "--output", tmp_path, *words))


def test_no_run_and_an_import_without_output(runs: Path, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert "found no valid checkpoint" in said(capsys, "--run", tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"")
    assert "--output FOLDER says where" in said(capsys, "--run", tmp_path)


def test_a_folder_that_cannot_be_written_is_named(runs: Path, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert f"{tmp_path / 'file'}" in said(capsys, "--run", runs / "run", "--output", tmp_path / "file")


@pytest.mark.slow
def test_another_tokenizer_or_list_of_answers_than_in_training_is_refused(
    runs: Path, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    """Those of the run are used, whatever the data brings."""
    other = tmp_path / "other"
    shutil.copytree(runs / "data", other / "data")
    (other / "data" / "answers.json").write_text(json.dumps(vocabulary_file([("maybe", 9)] * 1, ["train"])))
    train_tokenizer([runs / "data" / "synth" / "train"], other / "fresh", 290)
    shutil.rmtree(other / "data" / "tokenizer")
    shutil.copytree(other / "fresh", other / "data" / "tokenizer")
    words = ["--data", other / "data" / "synth", "--output", tmp_path / "scores"]
    assert scored(capsys, "--run", runs / "run", *words)[0] == scored(capsys, "--run", runs / "run")[0]

    moved = shutil.copytree(runs / "run", tmp_path / "run")
    shutil.rmtree(moved / "tokenizer")
    shutil.copytree(other / "fresh", moved / "tokenizer")
    line = said(capsys, "--run", moved)
    assert "was trained with another tokenizer" in line and str(moved / "tokenizer") in line

    values = scored(capsys, "--run", runs / "vqa", "--data", other / "data" / "asked", "--output", tmp_path / "scores")[
        0
    ]
    assert "vqa_accuracy" in values
    moved = shutil.copytree(runs / "vqa", tmp_path / "vqa")
    shutil.copy(other / "data" / "answers.json", moved)
    line = said(capsys, "--run", moved)
    assert "was trained with another answers" in line and str(moved / "answers.json") in line


@pytest.mark.slow
def test_a_submission_has_every_question_and_a_hole_is_named(
    runs: Path, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    words = ["--run", runs / "vqa", "--output", tmp_path, "--submission"]
    assert "leave out --samples" in said(capsys, *words, "--samples", "3")
    _, card, _, folder = scored(capsys, *words)
    sent = json.loads((folder / "submission.json").read_text())
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [one["question_id"] for one in sent] == sorted(one["question_id"] for one in lines)
    assert len(sent) == card["items"] and card["standard_errors"]["vqa_accuracy"] > 0
    assert "vqa_accuracy_standard_error" not in card["metrics"] and card["protocol"]["evaluator"]
    assert all("score" in line for line in lines), "what summarise adds is written down"

    broken = shutil.copytree(runs / "data", tmp_path / "broken")
    tar = min((broken / "asked" / "dev").glob("*.tar"))
    content = bytearray(tar.read_bytes())
    content[512:515] = b"bad"  # the first image
    tar.write_bytes(content)
    capsys.readouterr()
    assert evaluate.main([str(w) for w in [*words, "--data", broken / "asked"]]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: --submission: question_id 0") and "hole" in line
    (card,) = (json.loads(path.read_text()) for path in tmp_path.glob("vqa-toy-dev-step_1*/scorecard.json"))
    assert card["unusable"]["items"] > 0 and card["unusable"]["named"][0][1]
    assert not (folder / "submission.json").exists(), "the earlier one is not of these predictions"


@pytest.mark.slow
def test_looking_at_a_test_split_again_is_said(runs: Path, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    words = ["--run", runs / "run", "--output", tmp_path]
    assert "evaluations_of_this_split_before" not in scored(capsys, *words)[1]
    found = [scored(capsys, *words, "--split", "test") for _ in range(3)]
    assert [card["evaluations_of_this_split_before"] for _, card, _, _ in found] == [0, 1, 2]
    assert ["choose settings and checkpoints" in line for _, _, line, _ in found] == [
        False,
        True,
        True,
    ]


@pytest.mark.slow
def test_another_evaluation_of_the_same_name_gets_a_folder_of_its_own(
    runs: Path, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    words = ["--run", runs / "run", "--output", tmp_path]
    first, again = (scored(capsys, *words)[3] for _ in range(2))
    other, once_more = (scored(capsys, *words, "--samples", "3")[3] for _ in range(2))
    assert first == again and other == once_more and other.name.startswith(f"{first.name}-")
    assert json.loads((first / "scorecard.json").read_text())["items"] == 6
