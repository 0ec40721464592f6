"""VQAv2 and Visual Genome's questions: small files of exactly the published schema, and every way they can be wrong."""

import json
from pathlib import Path

import pytest

from data_prep.manifest import read_manifest
from data_prep.vqa_answers import build_vocabulary, read_vocabulary
from tests.data_prep.annotations.prepared import images, metas, overlap, picture, prepare, put, rejected, write_json

ANSWERS = ["net", "net", "net", "netting", "net", "Net.", "a net", "net", "mesh", ""]


def question(image_id, number, text="What is this photo taken looking through?"):
    return {"image_id": image_id, "question": text, "question_id": 1000 * image_id + number}


def annotation(image_id, number, answers=ANSWERS, answer_type="other"):
    return {
        "question_type": "what is this",
        "multiple_choice_answer": max(answers, key=answers.count),
        "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(answers, 1)],
        "image_id": image_id,
        "answer_type": answer_type,
        "question_id": 1000 * image_id + number,
    }


def questions_file(folder, subtype, questions):
    content = {
        "info": {"version": "2.0"},
        "task_type": "Open-Ended",
        "data_type": "mscoco",
        "license": {"name": "CC BY 4.0"},
        "data_subtype": subtype,
        "questions": questions,
    }
    return write_json(folder / f"v2_OpenEnded_mscoco_{subtype}_questions.json", content)


def annotations_file(folder, subtype, annotations):
    content = {"info": {}, "license": {}, "data_subtype": subtype, "annotations": annotations, "data_type": "mscoco"}
    return write_json(folder / f"v2_mscoco_{subtype}_annotations.json", content)


def coco_image(folder, image_id, split):
    put(folder / f"COCO_{split}_{image_id:012d}.jpg", picture(image_id))


@pytest.fixture
def vqa(tmp_path):
    """Two training images with two questions each, a held-out one with three, a test image; folders as unpacked."""
    for split, numbers in (("train2014", (9, 25)), ("val2014", (42,)), ("test2015", (7,))):
        for number in numbers:
            coco_image(tmp_path / "coco" / split, number, split)
    mixed = [(9, 0), (25, 0), (9, 1), (25, 1)]  # the questions of an image do not stand together
    questions_file(tmp_path, "train2014", [question(*one) for one in mixed])
    annotations_file(tmp_path, "train2014", [annotation(*one) for one in mixed[::-1]])  # nor in the questions' order
    questions_file(tmp_path, "val2014", [question(42, n) for n in range(3)])
    annotations_file(tmp_path, "val2014", [annotation(42, n, ["xyzzy"] * 10, "number") for n in range(3)])
    questions_file(tmp_path, "test2015", [question(7, 0)])
    questions_file(tmp_path, "test-dev2015", [question(7, 0)])
    return tmp_path


def command(folder, *splits, **options):
    found = {kind: sorted(folder.glob(f"v2_*_{kind}.json")) for kind in ("questions", "annotations")}
    if splits:
        chosen = {kind: [p for p in paths if p.stem.split("_")[-2] in splits] for kind, paths in found.items()}
    else:
        chosen = found
    arguments = ["vqav2", "--questions", *chosen["questions"], "--images", folder / "coco"]
    arguments += ["--annotations", *chosen["annotations"]] if chosen["annotations"] else []
    arguments += ["--output", folder / "data" / "vqav2", "--vg-output", folder / "data" / "vg_qa"]
    for name, values in options.items():
        arguments += [f"--{name.replace('_', '-')}", *(values if isinstance(values, list) else [values])]
    return arguments


def test_one_image_with_all_its_questions(vqa, capsys):
    assert prepare(*command(vqa, min_answer_count=2)) == 0
    printed = capsys.readouterr().out
    assert (
        "vqav2 train: 4 questions (published: 443,757, 443,753 fewer), 2 images (published: 82,783, 82,781" in printed
    )
    output = vqa / "data" / "vqav2"
    train = metas(output / "train")
    assert [meta["image_id"] for meta in train] == [9, 25]
    assert train[0] == {
        "image_id": 9,
        "source": "vqav2",
        "file": "COCO_train2014_000000000009.jpg",
        "image_identities": ["coco/9"],
        "question_id": [9000, 9001],
        "answers": [ANSWERS, ANSWERS],
        "answer_type": ["other"] * 2,
        "question_type": ["what is this"] * 2,
        "multiple_choice_answer": ["net"] * 2,
        "captions": ["What is this photo taken looking through?"] * 2,
    }
    assert images(output / "train")["COCO_train2014_000000000009.jpg"] == picture(9)
    assert [read_manifest(output / split).rows for split in ("train", "dev", "test", "test_dev")] == [4, 3, 1, 1]
    (test,) = metas(output / "test")
    assert set(test) == {"image_id", "source", "file", "image_identities", "question_id", "captions"}
    assert overlap(output) == 0


def test_questions_whose_answers_are_not_in_the_vocabulary_stay(vqa, capsys):
    """The official score counts all 214,354 questions of val: none is lost to the vocabulary."""
    assert prepare(*command(vqa, min_answer_count=4)) == 0
    assert "answers.json: 1 answers of at least 4 questions in train, dev" in capsys.readouterr().out
    output = vqa / "data" / "vqav2"
    assert read_vocabulary(output / "answers.json") == ["net"]
    assert read_manifest(output / "dev").rows == 3


def test_the_vocabulary_is_of_the_named_splits(vqa, capsys):
    content = {}
    for splits, expected in (("train", ["net"]), ("train,dev", ["net", "xyzzy"])):
        assert prepare(*command(vqa, min_answer_count=3, answer_splits=splits), "--overwrite") == 0
        content[splits] = json.loads((vqa / "data" / "vqav2" / "answers.json").read_text())
        assert content[splits]["answers"] == expected
    assert content["train"]["sha256"] != content["train,dev"]["sha256"]
    assert content["train,dev"]["counts"] == [4, 3] == [n for _, n in build_vocabulary([["net"]] * 4 + [["x"]] * 3, 3)]
    assert prepare(*command(vqa, "train2014", min_answer_count=99)) == 2
    assert "0 answers of at least 99 questions in train; lower --min-answer-count" in capsys.readouterr().err


def test_a_vocabulary_that_is_there_is_not_replaced_by_another(vqa, capsys):
    assert prepare(*command(vqa, "train2014", min_answer_count=2)) == 0
    before = (vqa / "data" / "vqav2" / "answers.json").read_bytes()
    assert prepare(*command(vqa, "val2014", min_answer_count=2)) == 0  # no training split: it stays as it is
    assert "answers.json: not made" in capsys.readouterr().out
    write_json(vqa / "data" / "vqav2" / "answers.json", {"version": 1})
    for split in ("train", "dev"):
        (vqa / "data" / "vqav2" / split).rename(vqa / split)
    assert prepare(*command(vqa, "train2014", min_answer_count=2)) == 2
    assert "another vocabulary is there, which trained models depend on" in capsys.readouterr().err
    assert not (vqa / "data" / "vqav2" / "train").exists()
    assert prepare(*command(vqa, "train2014", min_answer_count=2), "--overwrite") == 0
    assert (vqa / "data" / "vqav2" / "answers.json").read_bytes() == before


@pytest.mark.parametrize("place", ["{0}", "coco/train2014/{0}", "coco/{1}", "coco/train2014/{1}"])
def test_either_name_of_a_coco_image_is_found(tmp_path, place):
    path = place.format("COCO_train2014_000000000009.jpg", "000000000009.jpg")
    put(tmp_path / path, picture(9))
    questions_file(tmp_path, "train2014", [question(9, 0)])
    annotations_file(tmp_path, "train2014", [annotation(9, 0)])
    assert prepare(*command(tmp_path, min_answer_count=1, images=[tmp_path, tmp_path / "coco"])) == 0
    (meta,) = metas(tmp_path / "data" / "vqav2" / "train")
    assert meta["file"] == Path(path).name and meta["image_identities"] == ["coco/9"]


def test_what_cannot_be_used_is_named(vqa, capsys):
    """Invariant 8: each question and annotation is written or named, and only once."""
    other = [annotation(25, 5), annotation(25, 6, ANSWERS[:9]), annotation(25, 7), annotation(25, 8), annotation(9, 0)]
    other[0]["image_id"] = 9
    other[2]["answers"][3]["answer_id"] = 1
    other[3]["answers"] = "net"
    questions = [question(25, n) for n in range(4, 9)] + [question(9, 0), question(25, 9, " "), {"image_id": 25}]
    questions += [question(31, 0), question(25, 10, "\ud800?"), {**question(25, 11), "image_id": "25"}]
    questions = [question(9, 0), question(25, 0), *questions]
    annotations = [annotation(9, 0), annotation(25, 0), *other, annotation(25, 9), annotation(31, 0)]
    annotations += [annotation(25, 10), annotation(25, 11), annotation(77, 0), {"answers": []}]
    questions_file(vqa, "train2014", questions)
    annotations_file(vqa, "train2014", annotations)
    assert prepare(*command(vqa, "train2014", min_answer_count=1)) == 0
    printed = capsys.readouterr().out
    split = vqa / "data" / "vqav2" / "train"
    assert [meta["question_id"] for meta in metas(split)] == [[9000], [25000]]
    found = rejected(split)
    expected = [
        ("malformed_row", "v2_mscoco_train2014_annotations.json annotation 12", 1),
        ("duplicate_id", "annotation of question 9000", 1),
        ("answers_missing", "question 25004", 1),
        ("other_image", "question 25005", 1),
        ("answers_missing", "question 25006", 1),
        ("duplicate_id", "question 25007", 1),
        ("malformed_row", "question 25008", 1),
        ("duplicate_id", "question 9000", 1),
        ("malformed_row", "v2_OpenEnded_mscoco_train2014_questions.json question 9", 1),
        ("invalid_utf8", "question 25010", 1),
        ("malformed_row", "question 25011", 1),
        ("question_missing", "annotation of question 77000", 1),
        ("empty_caption", "COCO_train2014_000000000025", 1),
        ("missing_image", "COCO_train2014_000000000031", 1),
    ]
    assert sorted(found) == sorted(expected)
    assert f"{split}: question_missing: annotation of question 77000 (no such question in v2_OpenEnded" in printed
    assert f"{split}: answers_missing: question 25004 (no annotation of it), and 1 more rows" in printed
    assert all(line.count("\n") == 0 for line in printed.splitlines())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "v2_mscoco_train2014_annotations.json").unlink(), "no annotations of train2014; give v2_ms"),
        (lambda f: (f / "v2_OpenEnded_mscoco_train2014_questions.json").unlink(), "of which there are no questions"),
        (lambda f: questions_file(f, "train2014", {}), "no list `questions`"),
        (lambda f: annotations_file(f, "train2014", None), "no list `annotations`"),
        (lambda f: questions_file(f, None, []), "no `data_subtype` such as train2014"),
        (lambda f: write_json(f / "v2_a_train2014_questions.json", [1]), "holds a list, expected VQAv2 questions"),
        (lambda f: put(f / "v2_a_train2014_questions.json", b"{"), "not readable as JSON"),
        (lambda f: put(f / "v2_a_train2014_questions.json", b"[" * 200000), "not readable as JSON"),
        (lambda f: (f / "v2_a_train2014_questions.json").write_bytes(
            (f / "v2_OpenEnded_mscoco_train2014_questions.json").read_bytes()), "of train2014 like"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_one_line(vqa, capsys, change, message):
    change(vqa)
    assert prepare(*command(vqa)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (vqa / "data").exists()


def test_images_must_be_named_unless_only_to_be_checked(vqa, capsys):
    arguments = [one for one in command(vqa) if one not in ("--images", vqa / "coco")]
    assert prepare(*arguments, "--min-answer-count", 1) == 2 and "--images: none given" in capsys.readouterr().err
    assert prepare(*arguments, "--check", "--min-answer-count", 1) == 0
    assert "vqav2 test_dev: 1 questions (published: 107,394" in capsys.readouterr().out
    assert not (vqa / "data").exists()
    assert prepare(*command(vqa, "train2014", split=["a", "b"])) == 2
    assert "--split a b: expected a name for each of the 1" in capsys.readouterr().err


def visual_genome(folder):
    """Images 1 (not of COCO), 2 (COCO 9, of train2014) and 3 (COCO 42, of val2014)."""
    image_data = [
        {"image_id": n, "url": f"https://h/{n}.jpg", "width": 20, "height": 20, "coco_id": coco, "flickr_id": None}
        for n, coco in ((1, None), (2, 9), (3, 42))
    ]
    qas = [
        {
            "id": image,
            "qas": [
                {"a_objects": [], "question": f"Q{k}?", "image_id": image, "qa_id": 10 * image + k, "answer": "A net."}
                | {"q_objects": []}
                for k in range(2)
            ],
        }
        for image in (1, 2, 3)
    ]
    qas[0]["qas"] += [dict(qas[0]["qas"][0]), {"qa_id": 15, "image_id": 99, "question": "?", "answer": "x"}]
    for number, place in ((1, "VG_100K"), (2, "VG_100K_2"), (3, "VG_100K")):
        put(folder / "vg" / place / f"{number}.jpg", picture(number))
    return {
        "vg_qa": write_json(folder / "question_answers.json", qas),
        "vg_image_data": write_json(folder / "image_data.json", image_data),
        "vg_images": folder / "vg",
    }


def test_visual_genome_without_held_out_images(vqa, capsys):
    files = visual_genome(vqa)
    assert prepare(*command(vqa, "train2014", "val2014", min_answer_count=1, **files)) == 0
    split = vqa / "data" / "vg_qa" / "train"
    assert [(m["image_id"], m["coco_id"], m["image_identities"]) for m in metas(split)] == [
        (1, None, ["visual_genome/1"]),
        (2, 9, ["coco/9"]),
    ]
    meta = metas(split)[0]
    assert (meta["question_id"], meta["source"]) == ([10, 11], "vg_qa") and meta["answers"] == [["A net."] * 10] * 2
    assert rejected(split) == [
        ("duplicate_id", "Visual Genome question 10", 1),
        ("missing_image", "Visual Genome question 15", 1),
        ("held_out_image", "Visual Genome question 30", 1),
        ("held_out_image", "Visual Genome question 31", 1),
    ]
    assert overlap(vqa / "data") == 0
    capsys.readouterr()


def test_what_is_held_out_must_be_known(vqa, capsys):
    files = visual_genome(vqa)
    assert prepare(*command(vqa, "train2014", min_answer_count=1, **files)) == 2
    assert "no held-out images of COCO are known" in capsys.readouterr().err
    held_out = vqa / "v2_OpenEnded_mscoco_val2014_questions.json"
    assert prepare(*command(vqa, "train2014", min_answer_count=1, **files, held_out=held_out)) == 0
    assert read_manifest(vqa / "data" / "vg_qa" / "train").rejected["held_out_image"] == 2
    del files["vg_image_data"]
    assert prepare(*command(vqa, "train2014", min_answer_count=1, **files)) == 2
    assert "--vg-image-data" in capsys.readouterr().err
