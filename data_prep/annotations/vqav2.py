"""Reads questions and annotations in VQA's form: VQAv2's (v2_OpenEnded_mscoco_*, v2_mscoco_*) and others like them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.annotations.annotated import Annotated, AnnotatedSplit, coco_images
from data_prep.annotations.files import BadEntry, entries_of, list_of, read_object, text, whole_number
from data_prep.record import PrepError, Rejection

SPLIT_OF = {"train2014": "train", "val2014": "dev", "test2015": "test", "test-dev2015": "test_dev"}
NUM_ANSWERS = 10
_QUESTIONS = "VQAv2 questions as in v2_OpenEnded_mscoco_train2014_questions.json"


class Annotation(NamedTuple):
    """What the annotations say of one question: ``answers`` as they stand, in order, and what else is kept."""

    image_id: int
    answers: list[str]
    also: dict[str, Any]


class Schema(NamedTuple):
    """A set in VQA's form: its name, what its files are, what its splits are called by ``data_subtype``, and how one
    entry of its annotations is read, given the whole file."""

    name: str
    questions: str
    annotations: str
    split_of: dict[str, str]
    annotation: Callable[[dict[str, Any], dict[str, Any]], Annotation]


class _AnnotationFile(NamedTuple):
    of_question: dict[int, Annotation]
    problems: dict[int, Rejection]  # question id -> why its answers can't be used
    nameless: list[Rejection]


def read_vqav2(
    questions: Sequence[Path], annotations: Sequence[Path], splits: Sequence[str] | None = None
) -> list[AnnotatedSplit]:
    """The splits of VQAv2; arguments and errors as of :func:`read_vqa_form`."""
    return read_vqa_form(VQAV2, questions, annotations, splits)


def read_vqa_form(
    schema: Schema, questions: Sequence[Path], annotations: Sequence[Path], splits: Sequence[str] | None = None
) -> list[AnnotatedSplit]:
    """The splits of a set, one for each file of ``questions``, with all questions of an image together.

    A file's ``data_subtype`` says which annotations are its own and, without ``splits``, what its split is called.
    Questions of test subtypes have no answers. Raises PrepError for a file of another kind, a subtype that comes twice
    and questions other than of a test without annotations.
    """
    contents = _by_subtype(questions, schema.questions)
    answers = _by_subtype(annotations, schema.annotations)
    if unused := next((subtype for subtype in answers if subtype not in contents), None):
        raise PrepError(f"{answers[unused][0]}: annotations of {unused}, of which there are no questions; give both")
    if splits is not None and len(splits) != len(questions):
        raise PrepError(f"--split {' '.join(splits)}: expected a name for each of the {len(questions)} --questions")
    names = splits or [schema.split_of.get(subtype, subtype) for subtype in contents]
    if len(set(names)) < len(names):
        raise PrepError(f"--split {' '.join(names)}: a split comes twice")
    found = []
    for split, (subtype, (path, content)) in zip(names, contents.items(), strict=True):
        if subtype not in answers and not subtype.startswith("test"):
            file = schema.annotations.rpartition(" ")[2].replace("train2014", subtype)
            raise PrepError(f"{path}: no annotations of {subtype}; give {file} as well")
        annotated = _read_annotations(schema, *answers[subtype]) if subtype in answers else None
        found.append(_read_questions(schema, split, subtype, path, content, annotated))
    return found


def held_out_images(path: Path) -> set[int]:
    """The COCO ids of the images that a file of VQAv2 questions asks about; raises PrepError."""
    entries = entries_of(read_object(path, _QUESTIONS), "questions", path, _QUESTIONS)
    try:
        return {whole_number(entry, "image_id") for entry in entries}
    except BadEntry as error:
        raise PrepError(f"{path}: {error.detail}, expected {_QUESTIONS}") from error


def vocabulary_answers(split: AnnotatedSplit) -> Iterator[list[str]]:
    """For each question the answers that count for the vocabulary: the majority's alone, where it is known."""
    for image in split.images:
        majority = image.per_caption.get("multiple_choice_answer")
        yield from image.per_caption.get("answers", ()) if majority is None else ([answer] for answer in majority)


def _by_subtype(paths: Sequence[Path], expected: str) -> dict[str, tuple[Path, dict[str, Any]]]:
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in paths:
        content = read_object(path, expected)
        subtype = content.get("data_subtype")
        if not isinstance(subtype, str):
            raise PrepError(f"{path}: no `data_subtype` such as train2014, expected {expected}")
        if subtype in found:
            raise PrepError(f"{path}: of {subtype} like {found[subtype][0]}; give each file once")
        found[subtype] = path, content
    return found


def _read_annotations(schema: Schema, path: Path, content: dict[str, Any]) -> _AnnotationFile:
    file = _AnnotationFile({}, {}, [])
    for number, entry in enumerate(entries_of(content, "annotations", path, schema.annotations)):
        try:
            question_id = whole_number(entry, "question_id")
        except BadEntry as error:
            file.nameless.append(Rejection(error.reason, f"{path.name} annotation {number}", error.detail))
            continue
        if question_id in file.of_question or question_id in file.problems:
            name = f"annotation of question {question_id}"
            file.nameless.append(Rejection("duplicate_id", name, f"again in {path.name}; the earlier one counts"))
            continue
        try:
            file.of_question[question_id] = schema.annotation(entry, content)
        except BadEntry as error:
            file.problems[question_id] = Rejection(error.reason, f"question {question_id}", error.detail)
    return file


def _of_vqav2(entry: dict[str, Any], content: dict[str, Any]) -> Annotation:
    names = ("answer_type", "question_type", "multiple_choice_answer")
    _, texts = ten_answers(entry)
    return Annotation(whole_number(entry, "image_id"), texts, {name: text(entry, name) for name in names})


def ten_answers(entry: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """The answers to a question, as entries and as texts; raises BadEntry where there are not ten different ones."""
    answers = list_of(entry, "answers")
    texts = [text(answer, "answer") for answer in answers]
    if len(texts) != NUM_ANSWERS:
        raise BadEntry("answers_missing", f"{len(texts)} answers, expected {NUM_ANSWERS}")
    ids = [answer.get("answer_id") for answer in answers]
    if any(not isinstance(number, int) for number in ids) or len(set(ids)) < len(ids):
        raise BadEntry("duplicate_id", f"the ids {ids} of its answers are not distinct numbers")
    return answers, texts


VQAV2 = Schema("vqav2", _QUESTIONS, "VQAv2 annotations as in v2_mscoco_train2014_annotations.json", SPLIT_OF, _of_vqav2)


def _read_questions(
    schema: Schema, split: str, subtype: str, path: Path, content: dict[str, Any], annotated: _AnnotationFile | None
) -> AnnotatedSplit:
    entries = entries_of(content, "questions", path, schema.questions)
    images: dict[int, Annotated] = {}
    problems = list(annotated.nameless) if annotated else []
    seen: set[int] = set()
    num_answers = 0
    for number, entry in enumerate(entries):
        name = f"{path.name} question {number}"
        try:
            question_id = whole_number(entry, "question_id")
            name = f"question {question_id}"
            if question_id in seen:
                raise BadEntry("duplicate_id", f"again in {path.name}; the earlier one counts")
            seen.add(question_id)
            image_id, question = whole_number(entry, "image_id"), text(entry, "question")
            of_question: dict[str, Any] = {"question_id": question_id}
            if annotated is not None:
                answer = _answer_to(question_id, image_id, annotated)
                num_answers += len(answer.answers)
                of_question |= {"answers": answer.answers, **answer.also}
        except BadEntry as error:
            problems.append(Rejection(error.reason, name, error.detail))
            continue
        if image_id not in images:
            images[image_id] = _image(schema, image_id, subtype)
        images[image_id].add(question, **of_question)
    counts = {"questions": len(entries), "images": len(images)}
    if annotated is not None:
        counts["answers"] = num_answers
        strangers = [number for number in (*annotated.of_question, *annotated.problems) if number not in seen]
        problems += [
            Rejection("question_missing", f"annotation of question {number}", f"no such question in {path.name}")
            for number in strangers
        ]
    return AnnotatedSplit(split, list(images.values()), problems, counts)


def _answer_to(question_id: int, image_id: int, annotated: _AnnotationFile) -> Annotation:
    if problem := annotated.problems.get(question_id):
        raise BadEntry(problem.reason, problem.detail)
    annotation = annotated.of_question.get(question_id)
    if annotation is None:
        raise BadEntry("answers_missing", "no annotation of it")
    if annotation.image_id != image_id:
        raise BadEntry("other_image", f"asks about image {image_id}, its answers are about {annotation.image_id}")
    return annotation


def _image(schema: Schema, image_id: int, subtype: str) -> Annotated:
    images = coco_images(image_id, subtype.replace("test-dev", "test"))
    key = Path(images[0]).stem
    return Annotated(key, (images,), (f"coco/{image_id}",), {"image_id": image_id, "source": schema.name})
