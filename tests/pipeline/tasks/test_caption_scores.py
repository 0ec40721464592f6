"""Tests of the scores of captions."""

from __future__ import annotations

import pytest

from pipeline.tasks.caption_scores import first_mention, normalise, summarise

RED_CIRCLE = {"main_colour": "red", "main_shape": "circle"}
BLUE_SQUARE = {"main_colour": "blue", "main_shape": "square"}


def share(caption: str) -> float:
    others = ("a large blue square", ["-"], BLUE_SQUARE)
    return 2 * summarise([(caption, ["-"], RED_CIRCLE), others])["main_colour_and_shape_share"] - 1


@pytest.mark.parametrize(
    ("caption", "right"),
    [
        ("a large red circle above a small blue square", True),
        ("on a plain background there is a Red circle.", True),
        ("a large blue square above a small red circle", False),  # both words are there, but of the other object
        ("a large red square above a small blue circle", False),
        ("a large red", False),
        ("", False),
    ],
)
def test_main_object_is_the_first_mentioned(caption: str, right: bool) -> None:
    assert share(caption) == float(right)


def test_exact_match_ignores_case_spaces_and_full_stop() -> None:
    scored = [("A  red circle.", ["no", "a red circle"], {}), ("a red circle", ["a blue circle"], {})]
    assert summarise(scored) == {"captions": 2, "exact_match": 0.5}


def test_nothing_to_score() -> None:
    assert summarise([]) == {"captions": 0}


def test_words_are_whole_words() -> None:
    assert first_mention("a colored ring", {"red", "ring"}) == "ring"
    assert first_mention("two circles", {"circle"}) is None
    assert normalise("  A cat .") == "a cat"
