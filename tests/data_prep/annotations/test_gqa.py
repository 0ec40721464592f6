"""GQA: small files of exactly the published schema."""

import json

import pytest

from data_prep.manifest import read_manifest
from tests.data_prep.annotations.prepared import metas, overlap, picture, prepare, put, rejected, write_json


def asked(image_id, question, answer, structural="query", semantic="attr", **also):
    return {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "sky (2486325)"}],
        "entailed": ["02930160"],
        "equivalent": ["02930152"],
        "question": question,
        "imageId": image_id,
        "isBalanced": True,
        "groups": {"global": "weather", "local": "10-what_dark"},
        "answer": answer,
        "semanticStr": "select: sky (2486325)->verify: dark [0]",
        "annotations": {"answer": {}, "question": {"2": "2486325"}, "fullAnswer": {"2": "2486325"}},
        "types": {"detailed": "verifyAttr", "semantic": semantic, "structural": structural},
        "fullAnswer": f"It is {answer}.",
    } | also


QUESTIONS = {
    "02930152": asked("2354786", "Is the sky dark?", "yes", "verify"),
    "07333408": asked("n161313", "What is on the wall?", "pipe", semantic="rel", groups={"global": None, "local": "x"}),
    "07333405": asked("2354786", "Which color is it?", "blue"),
}


@pytest.fixture
def gqa(tmp_path):
    for number, name in enumerate(("2354786", "n161313", "7")):
        put(tmp_path / "images" / f"{name}.jpg", picture(number))
    write_json(tmp_path / "train_balanced_questions.json", QUESTIONS)
    return tmp_path


def words(folder, *more):
    return ["gqa", "--images", folder / "images", "--output", folder / "data" / "gqa", *more]


def test_an_image_with_all_its_questions_and_their_types(gqa, capsys):
    put(gqa / "images" / "8.jpg", picture(8))
    test = {"201": {"question": "What?", "imageId": "8", "isBalanced": True}}
    files = [gqa / "train_balanced_questions.json", write_json(gqa / "test_balanced_questions.json", test)]
    image_data = write_json(gqa / "image_data.json", [{"image_id": 2354786, "coco_id": 42, "url": "u"}])
    more = ["--vg-image-data", image_data, "--min-answer-count", 1]
    assert prepare(*words(gqa, "--input", *files, *more)) == 0
    printed = capsys.readouterr().out
    assert "gqa train: 3 questions (published: 943,000, 942,997 fewer), 2 images, 3 answers" in printed
    first, second = metas(gqa / "data" / "gqa" / "train")
    assert first["image_identities"] == ["coco/42"] and second["image_identities"] == ["gqa/n161313"]
    assert first["question_id"] == ["02930152", "07333405"] and first["answers"] == [["yes"] * 10, ["blue"] * 10]
    assert first["structural"] == ["verify", "query"] and second["semantic"] == ["rel"]
    assert first["full_answer"] == ["It is yes.", "It is blue."] and second["group"] == [""]
    (tested,) = metas(gqa / "data" / "gqa" / "test")
    assert tested["question_id"] == ["201"] and "answers" not in tested
    assert json.loads((gqa / "data" / "gqa" / "answers.json").read_text())["answers"] == ["blue", "pipe", "yes"]
    assert read_manifest(gqa / "data" / "gqa" / "train").texts == "questions"
    assert overlap(gqa / "data" / "gqa") == 0


def test_what_is_wrong_with_a_question_is_named(gqa):
    broken = {"1": asked("7", "What?", None), "2": {"question": "What?"}, "3": asked("../7", "What?", "x")}
    path = write_json(gqa / "val_balanced_questions.json", QUESTIONS | broken)
    assert prepare(*words(gqa, "--input", path)) == 0
    assert rejected(gqa / "data" / "gqa" / "dev") == [("malformed_row", f"question {n}", 1) for n in (1, 2, 3)]


def test_a_file_that_does_not_say_which_split_it_is(gqa, capsys):
    path = write_json(gqa / "mine.json", QUESTIONS)
    assert prepare(*words(gqa, "--input", path)) == 2
    assert "its name begins with none of train, val, testdev, test, challenge; name the split by --split" in (
        capsys.readouterr().err
    )
    assert prepare(*words(gqa, "--input", path, "--split", "mine")) == 0
    assert read_manifest(gqa / "data" / "gqa" / "mine").rows == 3
