"""OK-VQA: small files of exactly the published schema."""

import json

from data_prep.manifest import read_manifest
from tests.data_prep.annotations.prepared import metas, overlap, prepare, write_json
from tests.data_prep.annotations.test_vqav2 import coco_image, question

KINDS = {"one": "Vehicles and Transportation", "four": "Sports and Recreation", "other": "Other"}
RAW = ["racing"] * 4 + ["motor racing"] * 2 + ["race"] * 4
STEMMED = ["race"] * 4 + ["motor race"] * 2 + ["race"] * 4


def annotation(image_id, number, kind="four"):
    pairs = enumerate(zip(RAW, STEMMED, strict=True), 1)
    answers = [{"answer_id": n, "raw_answer": raw, "answer_confidence": "yes", "answer": a} for n, (raw, a) in pairs]
    return {
        "image_id": image_id,
        "answer_type": "other",
        "question_type": kind,
        "question_id": 1000 * image_id + number,
        "answers": answers,
        "confidence": 3,
    }


def questions_file(folder, subtype, questions):
    content = {"info": {"version": "1.1"}, "task_type": "Open-Ended", "data_type": "mscoco", "license": {}}
    content |= {"data_subtype": subtype, "questions": questions}
    return write_json(folder / f"OpenEnded_mscoco_{subtype}_questions.json", content)


def annotations_file(folder, subtype, annotations):
    content = {"info": {}, "license": {}, "data_subtype": subtype, "annotations": annotations, "data_type": "mscoco"}
    return write_json(folder / f"mscoco_{subtype}_annotations.json", content | {"question_types": KINDS})


def test_questions_with_their_kinds_of_knowledge_and_both_forms_of_their_answers(tmp_path, capsys):
    for subtype, numbers in (("train2014", (9,)), ("val2014", (42,))):
        for number in numbers:
            coco_image(tmp_path / "coco", number, subtype)
        questions_file(tmp_path, subtype, [question(number, n, "What sport?") for number in numbers for n in range(4)])
        annotations_file(tmp_path, subtype, [annotation(number, n) for number in numbers for n in range(4)])
    files = [["--questions", *tmp_path.glob("OpenEnded*")], ["--annotations", *tmp_path.glob("mscoco*")]]
    words = ["okvqa", *files[0], *files[1], "--images", tmp_path / "coco", "--output", tmp_path / "data" / "okvqa"]
    assert prepare(*words) == 0
    printed = capsys.readouterr().out
    assert "okvqa test: 4 questions (published: 5,046, 5,042 fewer)" in printed
    output = tmp_path / "data" / "okvqa"
    (meta,) = metas(output / "train")
    assert meta["question_id"] == [9000, 9001, 9002, 9003] and meta["answers"] == [STEMMED] * 4
    assert meta["raw_answers"] == [RAW] * 4 and meta["question_type"] == ["Sports and Recreation"] * 4
    assert "multiple_choice_answer" not in meta and meta["source"] == "okvqa"
    assert json.loads((output / "answers.json").read_text())["answers"] == ["race"]
    assert read_manifest(output / "test").texts == "questions"
    assert overlap(output) == 0


def test_questions_without_annotations_are_refused_by_the_name_of_their_file(tmp_path, capsys):
    path = questions_file(tmp_path, "val2014", [question(9, 0)])
    assert prepare("okvqa", "--questions", path, "--check") == 2
    assert "no annotations of val2014; give mscoco_val2014_annotations.json as well" in capsys.readouterr().err
