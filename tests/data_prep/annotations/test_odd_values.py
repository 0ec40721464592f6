"""A value of an annotation file may be anything: a reader names what it can't use, or refuses the file in one line."""

import copy
import json
import math

import pytest

from data_prep.annotations.annotated import Annotated
from data_prep.annotations.coco_form import read_coco_captions
from data_prep.annotations.easy_vqa import read_easy_vqa
from data_prep.annotations.gqa import read_gqa
from data_prep.annotations.karpathy import read_karpathy
from data_prep.annotations.nlvr2 import read_nlvr2
from data_prep.annotations.nocaps import read_nocaps
from data_prep.annotations.okvqa import read_okvqa
from data_prep.annotations.snli_ve import read_snli_ve
from data_prep.annotations.visual_genome import read_regions, read_visual_genome
from data_prep.annotations.vqav2 import read_vqav2
from data_prep.filters import REASONS
from data_prep.record import PrepError
from tests.data_prep.annotations import (
    test_caption_sets,
    test_gqa,
    test_karpathy,
    test_nlvr2,
    test_nocaps,
    test_okvqa,
    test_snli_ve,
)
from tests.data_prep.annotations.prepared import put, write_json
from tests.data_prep.annotations.test_vqav2 import annotation, annotations_file, question, questions_file

MISSING = object()
ODD = (MISSING, None, True, -1, 1.5, math.nan, 10**30, "", "\ud800", "../x", "a\0b", [], [1], {}, {"a": []})


def places(value, path=()):
    """The path of every value of a JSON document; of lists, of the first and the last entry."""
    yield path
    keys = list(value) if isinstance(value, dict) else [0, len(value) - 1] if isinstance(value, list) and value else []
    for key in dict.fromkeys(keys):
        yield from places(value[key], (*path, key))


def changed(document, path, odd):
    if not path:
        return {} if odd is MISSING else odd
    document = copy.deepcopy(document)
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    if odd is MISSING:
        del inner[path[-1]]
    else:
        inner[path[-1]] = odd
    return document


def lines_file(path, rows):
    put(path, b"\n".join(json.dumps(row).encode() for row in (rows if isinstance(rows, list) else [rows])))
    return path


def vqav2_questions(folder, content):
    annotations = annotations_file(folder, "train2014", [annotation(9, 0), annotation(9, 1)])
    return read_vqav2([write_json(folder / "q.json", content)], [annotations])


def vqav2_annotations(folder, content):
    questions = questions_file(folder, "train2014", [question(9, 0), question(9, 1)])
    return read_vqav2([questions], [write_json(folder / "a.json", content)])


def okvqa_annotations(folder, content):
    questions = test_okvqa.questions_file(folder, "train2014", [question(9, 0)])
    return read_okvqa([questions], [write_json(folder / "a.json", content)])


def loaded(path):
    return json.loads(path.read_text())


def cases(folder):
    """A sound document of each schema and how it is read."""
    coco = [test_karpathy.coco_entry(1, "val"), test_karpathy.coco_entry(2, "train")]
    flickr = [test_karpathy.flickr_entry(1, "val")]
    qas = [{"id": 1, "qas": [{"qa_id": 5, "image_id": 1, "question": "Q?", "answer": "A."}]}]
    image_data = [{"image_id": 1, "coco_id": 7, "url": "u"}, {"image_id": 2, "coco_id": None, "url": "u"}]
    easy = [["what shape is present?", "circle", 0], ["is there a circle?", "yes", 1]]
    nlvr2 = [test_nlvr2.row("train-1-0-0", directory=3), test_nlvr2.row("train-1-0-1")]
    snli = [test_snli_ve.row("47", 0), test_snli_ve.row("47", 1)]
    sound_qas, sound_data = write_json(folder / "s.json", qas), write_json(folder / "d.json", image_data)
    regions = [{"id": 1, "regions": [test_caption_sets.region(5, 1), test_caption_sets.region(6, 1)]}]
    sound_regions = write_json(folder / "regions.json", regions)
    sound_nlvr2 = lines_file(folder / "sound.json", nlvr2)
    return {
        "vqav2 questions": (
            loaded(questions_file(folder, "train2014", [question(9, 0), question(9, 1)])),
            vqav2_questions,
        ),
        "vqav2 annotations": (
            loaded(annotations_file(folder, "train2014", [annotation(9, 0), annotation(9, 1)])),
            vqav2_annotations,
        ),
        "okvqa annotations": (
            loaded(test_okvqa.annotations_file(folder, "train2014", [test_okvqa.annotation(9, 0)])),
            okvqa_annotations,
        ),
        "gqa": (test_gqa.QUESTIONS, lambda f, c: [read_gqa(write_json(f / "train_balanced_questions.json", c))]),
        "nocaps": (test_nocaps.content(2), lambda f, c: [read_nocaps(write_json(f / "n.json", c))]),
        "coco": ({"images": coco, "dataset": "coco"}, lambda f, c: read_karpathy(write_json(f / "k.json", c), "coco")),
        "flickr30k": (
            {"images": flickr, "dataset": "flickr30k"},
            lambda f, c: read_karpathy(write_json(f / "k.json", c), "flickr30k"),
        ),
        "vg questions": (qas, lambda f, c: [read_visual_genome(write_json(f / "v.json", c), sound_data, {9})]),
        "vg images": (image_data, lambda f, c: [read_visual_genome(sound_qas, write_json(f / "i.json", c), {9})]),
        "coco captions": (
            loaded(test_caption_sets.coco_file(folder, "val2014", (1, 2))),
            lambda f, c: [read_coco_captions(write_json(f / "captions_val2014.json", c))[1]],
        ),
        "vg regions": (regions, lambda f, c: [read_regions(write_json(f / "r.json", c), sound_data, {9})]),
        "vg images of regions": (
            image_data,
            lambda f, c: [read_regions(sound_regions, write_json(f / "i.json", c), {9})],
        ),
        "easy_vqa": (
            easy,
            lambda f, c: read_easy_vqa(write_json(f / "train" / "questions.json", c).parents[1], 0.5)[0],
        ),
        "nlvr2": (nlvr2, lambda f, c: [read_nlvr2(lines_file(f / "n.json", c))]),
        "nlvr2 lists": (nlvr2, lambda f, c: [read_nlvr2(sound_nlvr2, balanced=lines_file(f / "b.json", c))]),
        "snli_ve": (snli, lambda f, c: [read_snli_ve(lines_file(f / "snli_ve_dev.jsonl", c))]),
    }


NAMES = ("vqav2 questions", "vqav2 annotations", "coco", "flickr30k", "vg questions", "vg images")
NAMES += ("okvqa annotations", "gqa", "nocaps", "coco captions", "vg regions", "vg images of regions")
NAMES += ("easy_vqa", "nlvr2", "nlvr2 lists", "snli_ve")


def check(image: Annotated) -> None:
    assert image.captions and all(len(values) == len(image.captions) for values in image.per_caption.values())
    json.dumps([image.meta, image.per_caption, image.key], allow_nan=False, ensure_ascii=False).encode()
    assert not any(".." in name.split("/") or name.startswith("/") for names in image.images for name in names)


@pytest.mark.parametrize("name", NAMES)
def test_no_value_makes_a_reader_fail(tmp_path, name):
    document, read = cases(tmp_path)[name]
    sound = read(tmp_path, document)
    assert sound and not any(split.problems for split in sound)
    refused = 0
    for path in places(document):
        for odd in ODD:
            try:
                splits = read(tmp_path, changed(document, path, odd))
            except PrepError as error:
                assert "\n" not in str(error)
                refused += 1
                continue
            for split in splits:
                assert all(problem.reason in REASONS and "\n" not in problem.detail for problem in split.problems)
                for image in split.images:
                    check(image)
    assert refused
