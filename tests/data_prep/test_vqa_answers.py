"""Answers of VQA: the evaluator's normalisation against its published definition, the vocabulary, soft targets."""

import hashlib
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import vqa_answers
from data_prep.vqa_answers import build_vocabulary, majority, normalise, read_vocabulary, soft_scores, vocabulary_file


def by_the_definition(answer: str) -> str:
    """vqaEval.py at a013f00, step by step in its order; the tables are ours, pinned by their hash below."""
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    without_marks = text
    for mark in [
        ";",
        "/",
        "[",
        "]",
        '"',
        "{",
        "}",
        "(",
        ")",
        "=",
        "+",
        "\\",
        "_",
        "-",
        ">",
        "<",
        "@",
        "`",
        ",",
        "?",
        "!",
    ]:
        if (mark + " " in text or " " + mark in text) or re.search("(\\d)(\\,)(\\d)", text) is not None:
            without_marks = without_marks.replace(mark, "")
        else:
            without_marks = without_marks.replace(mark, " ")
    periods_gone, stripped = 0, ""
    for place, character in enumerate(without_marks):  # the pattern (?!<=\d)(\.)(?!\d), at most int(re.UNICODE) times
        literal = without_marks[place : place + 2] == "<="  # what "(?!<=\d)" asks for at the place of a period: never
        followed = re.match(r"\d", without_marks[place + 1 : place + 2]) is not None
        if character == "." and not literal and not followed and periods_gone < int(re.UNICODE):
            periods_gone += 1
        else:
            stripped += character
    words = []
    for word in stripped.lower().split():
        digits = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
        word = {**digits, "seven": "7", "eight": "8", "nine": "9", "ten": "10"}.get(word, word)
        if word not in ["a", "an", "the"]:
            words.append(word)
    for place, word in enumerate(words):
        if word in vqa_answers._CONTRACTIONS:
            words[place] = vqa_answers._CONTRACTIONS[word]
    return " ".join(words)


GOLDEN = {  # by hand from the rules of vqaEval.py at a013f00
    "": "",
    " \n\t ": "",
    "Yes.": "yes",
    "yes\n": "yes",
    "The cat": "cat",
    "A": "",
    "an a the": "",
    "a.": "",
    "two": "2",
    "None": "0",
    "zero": "0",
    "TEN": "10",
    "eleven": "eleven",
    "twenty-one": "twenty 1",
    "two.five": "twofive",
    "3.": "3",
    ".5": ".5",
    "1.5": "1.5",
    "3.a": "3a",
    "u.s.a.": "usa",
    "." * 40: "." * 8,
    "." * 32: "",
    "1,000-2 x": "10002 x",
    "1,000": "1000",
    "red,white": "red white",
    "red, white": "red white",
    "a,b c, d": "ab c d",  # a comma next to a space anywhere: every comma goes
    "no-parking": "no parking",
    "no - parking": "no parking",
    "t-shirt, blue": "t shirt blue",
    "10:30": "10:30",
    "$5": "$5",
    "100%": "100%",
    "man's": "man's",
    "what?!": "what",
    "and/or": "and or",
    "dont": "don't",
    "DONT": "don't",
    "don't": "don't",
    "don’t": "don’t",
    "Im": "im",
    "Ive": "ive",
    "Id've": "id've",
    "somebody'd": "somebodyd",
    "lets": "lets",
    "let's": "let's",
    "the dont": "don't",
    "does-nt": "does nt",
    "Ça va": "ça va",
    "ÜBER-cool": "über cool",
    "三,三": "三 三",
    "٣,٤-x": "٣٤x",  # digits of any script
    "x\u2028y": "x y",
    "İ": "i̇",
    "a\tb": "b",
}


@pytest.mark.parametrize("answer", GOLDEN)
def test_adversarial_answers(answer):
    assert normalise(answer) == GOLDEN[answer]
    assert by_the_definition(answer) == GOLDEN[answer]


PIECES = [
    *"abc. ,;/[]\"{}()=+\\_-><@`?!:'$%\n\t0123456789٣Üİ\u00a0\u2028猫",
    "..",
    "the",
    "A ",
    " two ",
    "none",
    " dont ",
]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=45).map("".join))
def test_normalise_is_the_definition(answer):
    assert normalise(answer) == by_the_definition(answer)


def test_the_contraction_table_is_that_of_the_evaluator():
    # 120 pairs; the hash was taken from the dictionary in the file at c4e6a0e, which a013f00 keeps.
    pairs = sorted(vqa_answers._CONTRACTIONS.items())
    digest = "3e5960526f62912d3b70896069c43c13d7c21be38d50ca28efbb9095b499454f"
    assert len(pairs) == 120
    assert hashlib.sha256(json.dumps(pairs).encode()).hexdigest() == digest


def test_vocabulary_counts_normalised_majority_answers():
    questions = [["Two", "2", "Two"]] * 5 + [["2"]] * 5 + [["red"] * 6 + ["blue"] * 4] * 9
    questions += [["apple"]] * 9 + [["rare"]] * 8 + [["The"]] * 20
    assert build_vocabulary(questions) == [("2", 10), ("apple", 9), ("red", 9)]
    assert build_vocabulary(reversed(questions)) == [("2", 10), ("apple", 9), ("red", 9)]
    assert ("rare", 8) in build_vocabulary(questions, min_count=8)


def test_majority_of_equally_frequent_answers_is_the_earlier_one():
    assert majority(["b", "a", "a", "b"]) == "b"
    for wrong in ([], "yes"):
        with pytest.raises(ValueError, match="list of at least one answer"):
            majority(wrong)


def test_soft_scores():
    index = {"2": 4, "red": 1, "blue": 0}
    answers = ["two"] + ["Red."] * 2 + ["blue"] * 3 + ["unknown"] * 4
    assert soft_scores(answers, index) == [(0, 0.9), (1, 0.6), (4, 0.3)]
    assert soft_scores(answers, index, normalised=False) == [(0, 0.9)]
    assert soft_scores(["blue"] * 10, index) == [(0, 1.0)] == soft_scores(["blue"] * 4 + ["x"] * 6, index)
    assert soft_scores(["unknown"] * 10, index) == []


def test_vocabulary_file_and_its_damages(tmp_path):
    path = tmp_path / "answers.json"
    content = vocabulary_file([("yes", 20), ("rätsel", 9)], ["train", "val"])
    assert content["counts"] == [20, 9] and content["min_count"] == 9 and content["splits"] == ["train", "val"]
    path.write_text(json.dumps(content))
    assert read_vocabulary(path) == ["yes", "rätsel"]
    for change, reason in [
        ({"answers": ["rätsel", "yes"]}, "differ from their sha256"),
        ({"answers": ["yes", "yes"]}, "'yes' is there twice"),
        ({"answers": ["yes", ""]}, "is empty"),
        ({"answers": [1]}, "expected an object with a list"),
        ({"version": 2}, "version 2, expected 1"),
    ]:
        path.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=reason) as caught:
            read_vocabulary(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    path.write_text("[")
    with pytest.raises(ValueError, match="cannot be read"):
        read_vocabulary(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_vocabulary(tmp_path / "none.json")
