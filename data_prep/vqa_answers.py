"""The answers of VQA: normalised as its evaluator does it, the vocabulary of a classifier, and soft targets.

Source of the rules and of the tables: vqaEvaluation/vqaEval.py of github.com/GT-Vision-Lab/VQA as of a013f00 (2021-03).
What looks like a mistake is one of that file, kept because published scores depend on it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

EVALUATOR = "GT-Vision-Lab/VQA a013f00"
MIN_COUNT = 9
VOCABULARY_VERSION = 1
VOTE_SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)  # of 0, 1, 2, 3, and 4 or more of the ten answers

_MARKS = ';/[]"{}()=+\\_-><@`,?!'  # not : ' $ % & # * and others; the period has a rule of its own
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
# NOTE evaluator: a look-behind for a digit was meant, and a flag was passed as the count. So every period goes that no
# digit follows, whatever stands before it, and of these the first 32 only.
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32
_ARTICLES = {"a", "an", "the"}
_NUMBERS = {"none": "0"} | {
    word: str(value)
    for value, word in enumerate("zero one two three four five six seven eight nine ten".split())  # no eleven
}
# NOTE evaluator: somebody'd loses its apostrophe; let's and she's stay as they are; Id've, I'dve, Im and Ive are never
# found, as words are in lower case by then; "lets" and many others are not in the table.
_CONTRACTIONS = dict(
    pair.split(":")
    for pair in """
    aint:ain't arent:aren't cant:can't couldve:could've couldnt:couldn't couldn'tve:couldn't've couldnt've:couldn't've
    didnt:didn't doesnt:doesn't dont:don't hadnt:hadn't hadnt've:hadn't've hadn'tve:hadn't've hasnt:hasn't
    havent:haven't hed:he'd hed've:he'd've he'dve:he'd've hes:he's howd:how'd howll:how'll hows:how's Id've:I'd've
    I'dve:I'd've Im:I'm Ive:I've isnt:isn't itd:it'd itd've:it'd've it'dve:it'd've itll:it'll let's:let's maam:ma'am
    mightnt:mightn't mightnt've:mightn't've mightn'tve:mightn't've mightve:might've mustnt:mustn't mustve:must've
    neednt:needn't notve:not've oclock:o'clock oughtnt:oughtn't ow's'at:'ow's'at 'ows'at:'ow's'at 'ow'sat:'ow's'at
    shant:shan't shed've:she'd've she'dve:she'd've she's:she's shouldve:should've shouldnt:shouldn't
    shouldnt've:shouldn't've shouldn'tve:shouldn't've somebody'd:somebodyd somebodyd've:somebody'd've
    somebody'dve:somebody'd've somebodyll:somebody'll somebodys:somebody's someoned:someone'd someoned've:someone'd've
    someone'dve:someone'd've someonell:someone'll someones:someone's somethingd:something'd
    somethingd've:something'd've something'dve:something'd've somethingll:something'll thats:that's thered:there'd
    thered've:there'd've there'dve:there'd've therere:there're theres:there's theyd:they'd theyd've:they'd've
    they'dve:they'd've theyll:they'll theyre:they're theyve:they've twas:'twas wasnt:wasn't wed've:we'd've
    we'dve:we'd've weve:we've werent:weren't whatll:what'll whatre:what're whats:what's whatve:what've whens:when's
    whered:where'd wheres:where's whereve:where've whod:who'd whod've:who'd've who'dve:who'd've wholl:who'll whos:who's
    whove:who've whyll:why'll whyre:why're whys:why's wont:won't wouldve:would've wouldnt:wouldn't
    wouldnt've:wouldn't've wouldn'tve:wouldn't've yall:y'all yall'll:y'all'll y'allll:y'all'll yall'd've:y'all'd've
    y'alld've:y'all'd've y'all'dve:y'all'd've youd:you'd youd've:you'd've you'dve:you'd've youll:you'll youre:you're
    youve:you've
    """.split()
)


def normalise(answer: str) -> str:
    """An answer as the evaluator compares it: without marks and articles, in lower case, numbers to ten in digits.

    It treats predictions and references alike, but neither where all references of a question are the same
    (``pipeline.metrics.vqa.accuracy``); there both are only ``trimmed``.
    """
    return _without_articles(_without_marks(trimmed(answer)))


def trimmed(answer: str) -> str:
    """The answer without white space at its ends; line breaks and tabs inside become spaces."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _without_marks(answer: str) -> str:
    """A mark next to a space goes, any other becomes a space; in an answer with a comma between digits all marks go.

    What stands next to a mark is judged on the answer as it was, not as the marks before it left it.
    """
    all_go = _DIGIT_COMMA_DIGIT.search(answer) is not None
    goes = {mark: all_go or f"{mark} " in answer or f" {mark}" in answer for mark in _MARKS}
    replaced = answer.translate({ord(mark): "" if goes[mark] else " " for mark in _MARKS})
    return _PERIOD.sub("", replaced, count=_MOST_PERIODS)


def _without_articles(answer: str) -> str:
    words = (_NUMBERS.get(word, word) for word in answer.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def majority(answers: Sequence[str]) -> str:
    """The most frequent of a question's answers as they stand; of equally frequent ones that which comes first.

    VQA's annotations hold it as ``multiple_choice_answer``; pass that alone, ``[answer]``, where it is known. Raises
    ValueError without answers.
    """
    if isinstance(answers, str) or not answers:
        raise ValueError(f"answers {answers!r}: expected a list of at least one answer for each question")
    return Counter(answers).most_common(1)[0][0]


def build_vocabulary(
    answers_of_questions: Iterable[Sequence[str]], min_count: int = MIN_COUNT
) -> list[tuple[str, int]]:
    """(answer, number of questions) of each normalised majority answer of at least ``min_count`` questions.

    The most frequent come first, equally frequent ones by the alphabet (of code points); the empty answer is never in.
    """
    counts = Counter(normalise(majority(answers)) for answers in answers_of_questions)
    kept = [(answer, count) for answer, count in counts.items() if count >= min_count and answer]
    return sorted(kept, key=lambda entry: (-entry[1], entry[0]))


def soft_scores(answers: Sequence[str], index: Mapping[str, int], normalised: bool = True) -> list[tuple[int, float]]:
    """(class, score) of each class of the vocabulary that a question's answers name, in order of classes.

    The score is the accuracy that the class would have among ten answers: .3, .6, .9, 1 for 1, 2, 3, 4 or more votes.
    ``normalised`` False looks the answers up as they stand, like the FLM release, which loses votes.
    """
    votes = Counter(normalise(answer) if normalised else answer for answer in answers)
    found = sorted((index[answer], count) for answer, count in votes.items() if answer in index)
    return [(number, VOTE_SCORES[min(count, 4)]) for number, count in found]


def vocabulary_file(
    vocabulary: Sequence[tuple[str, int]], splits: Sequence[str], min_count: int = MIN_COUNT
) -> dict[str, Any]:
    """What answers.json holds: the answers in order of their classes, how they came about, and their hash."""
    answers = [answer for answer, _ in vocabulary]
    return {
        "version": VOCABULARY_VERSION,
        "answers": answers,
        "counts": [count for _, count in vocabulary],
        "min_count": min_count,
        "splits": list(splits),
        "evaluator": EVALUATOR,
        "sha256": answers_hash(answers),
    }


def answers_hash(answers: Sequence[str]) -> str:
    """SHA-256 of the answers in their order, which is that of a classifier's outputs."""
    return hashlib.sha256(json.dumps(list(answers)).encode("ascii")).hexdigest()


def read_vocabulary(path: Path) -> list[str]:
    """The answers of a vocabulary file in order of their classes.

    Raises ValueError, in one line that names the file, for what cannot be read, another version, an answer that is
    empty or there twice, and answers that differ from their hash.
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as a vocabulary of answers ({error})") from error
    answers = content.get("answers") if isinstance(content, dict) else None
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"{path}: expected an object with a list `answers`, as `python -m data_prep vqav2` writes it")
    if content.get("version") != VOCABULARY_VERSION:
        raise ValueError(f"{path}: version {content.get('version')!r}, expected {VOCABULARY_VERSION}")
    wrong = next((answer for answer, count in Counter(answers).items() if count > 1 or not answer), None)
    if wrong is not None:
        raise ValueError(f"{path}: the answer {wrong!r} is {'there twice' if wrong else 'empty'}; prepare it again")
    if content.get("sha256") != answers_hash(answers):
        raise ValueError(f"{path}: the answers differ from their sha256: the file was changed; prepare it again")
    return answers
