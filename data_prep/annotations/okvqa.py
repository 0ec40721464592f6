"""Reads OK-VQA's questions and annotations as published (OpenEnded_mscoco_*, mscoco_*, version 1.1)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.annotations.annotated import AnnotatedSplit
from data_prep.annotations.files import text, whole_number
from data_prep.annotations.vqav2 import Annotation, Schema, read_vqa_form, ten_answers


def read_okvqa(
    questions: Sequence[Path], annotations: Sequence[Path], splits: Sequence[str] | None = None
) -> list[AnnotatedSplit]:
    """The splits of OK-VQA; arguments and errors as of :func:`data_prep.annotations.vqav2.read_vqa_form`.

    Its evaluation is on the images of val2014, so that split is called test, as its authors call it.
    """
    return read_vqa_form(OKVQA, questions, annotations, splits)


def _annotation(entry: dict[str, Any], content: dict[str, Any]) -> Annotation:
    """``answer`` is what the evaluator compares, ``raw_answer`` what was typed, whose words have their endings.

    The kind of knowledge is a word of the entry ("four") that the file's ``question_types`` explains.
    """
    answers, texts = ten_answers(entry)
    kind = text(entry, "question_type")
    kinds = content.get("question_types")
    also = {
        "answer_type": text(entry, "answer_type"),
        "question_type": text(kinds, kind) if isinstance(kinds, dict) and kind in kinds else kind,
        "raw_answers": [text(answer, "raw_answer") for answer in answers],
        "answer_confidences": [text(answer, "answer_confidence") for answer in answers],
    }
    return Annotation(whole_number(entry, "image_id"), texts, also)


OKVQA = Schema(
    "okvqa",
    "OK-VQA questions as in OpenEnded_mscoco_train2014_questions.json",
    "OK-VQA annotations as in mscoco_train2014_annotations.json",
    {"train2014": "train", "val2014": "test"},
    _annotation,
)
