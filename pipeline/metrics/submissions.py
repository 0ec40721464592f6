"""Files that official evaluators score: answers of VQA and GQA, and the COCO captions results file, each item once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any


class SubmissionError(ValueError):
    """What would be refused, or scored wrongly, in one line that names the item."""


def vqa_submission(answers: Iterable[tuple[int, str]], expected_ids: Iterable[int]) -> list[dict[str, Any]]:
    """[{"question_id": int, "answer": str}, ...] in order of ids, checked by ``check_vqa``."""
    entries = [{"question_id": number, "answer": answer} for number, answer in answers]
    check_vqa(entries, expected_ids)
    return sorted(entries, key=lambda entry: entry["question_id"])


def gqa_submission(answers: Iterable[tuple[str, str]], expected_ids: Iterable[str]) -> list[dict[str, str]]:
    """[{"questionId": str, "prediction": str}, ...] in order of ids, which are texts in GQA, each of the split once."""
    entries = [{"questionId": number, "prediction": answer} for number, answer in answers]
    _check(entries, "questionId", "prediction", expected_ids, str)
    return sorted(entries, key=lambda entry: entry["questionId"])


def caption_submission(captions: Iterable[tuple[int, str]], expected_ids: Iterable[int]) -> list[dict[str, Any]]:
    """[{"image_id": int, "caption": str}, ...] in order of ids, checked by ``check_captions``."""
    entries = [{"image_id": number, "caption": caption} for number, caption in captions]
    check_captions(entries, expected_ids)
    return sorted(entries, key=lambda entry: entry["image_id"])


def check_vqa(content: Any, expected_ids: Iterable[int]) -> None:
    """Check the content of an EvalAI file against the ids of all questions of its split.

    The test-dev phase wants every question of test2015, too. The server compares sets of ids, so that a question
    answered twice passes there and the last answer counts; here it does not. Raises SubmissionError.
    """
    _check(content, "question_id", "answer", expected_ids)


def check_captions(content: Any, expected_ids: Iterable[int]) -> None:
    """Check the content of a COCO captions results file against the ids of all images; an empty caption is refused,
    because the server's tokenizer loses it. Raises SubmissionError."""
    _check(content, "image_id", "caption", expected_ids)
    for entry in content:
        if not entry["caption"].strip():
            raise SubmissionError(f"image_id {entry['image_id']}: the caption is empty; expected at least one word")


def _check(content: Any, id_name: str, text_name: str, expected_ids: Iterable[Any], id_type: type = int) -> None:
    if not isinstance(content, list):
        raise SubmissionError(f"{type(content).__name__} found, expected a list of one object for each {id_name}")
    for place, entry in enumerate(content):
        if not isinstance(entry, dict) or set(entry) != {id_name, text_name}:
            found = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
            raise SubmissionError(f"entry {place}: {found} found, expected exactly {id_name} and {text_name}")
        number, text = entry[id_name], entry[text_name]
        if type(number) is not id_type:  # True is an int, and numpy's integers cannot be written
            wanted = id_type.__name__
            raise SubmissionError(f"entry {place}: {id_name} {number!r} is {type(number).__name__}, expected {wanted}")
        if type(text) is not str:
            raise SubmissionError(f"{id_name} {number}: {text_name} is {type(text).__name__}, expected str")
    counts = Counter(entry[id_name] for entry in content)
    expected = set(expected_ids)
    _refuse((number for number, count in counts.items() if count > 1), id_name, "is there more than once")
    _refuse(counts.keys() - expected, id_name, "is not of this split")
    _refuse(expected - counts.keys(), id_name, f"has no {text_name}: the file has a hole")


def _refuse(numbers: Iterable[Any], id_name: str, why: str) -> None:
    if wrong := sorted(numbers):
        others = f" (and {len(wrong) - 1:,} more)" if len(wrong) > 1 else ""
        raise SubmissionError(f"{id_name} {wrong[0]}{others} {why}; expected each id of the split exactly once")
