"""Tests of the scores of captions."""

from __future__ import annotations

import pytest

from pipeline.metrics import captions as metrics
from pipeline.metrics.java import MetricMissing
from pipeline.tasks.caption_scores import exact_share, first_mention, in_words, normalise, summarise

RED_CIRCLE = {"main_colour": "red", "main_shape": "circle"}
BLUE_SQUARE = {"main_colour": "blue", "main_shape": "square"}


def share(caption: str) -> float:
    others = ("a large blue square", ["-"], BLUE_SQUARE)
    return 2 * summarise([(caption, ["-"], RED_CIRCLE), others]).values["main_colour_and_shape_share"] - 1


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
    scored = [("A  red circle.", ["no", "a red circle"], RED_CIRCLE), ("a red circle", ["a blue circle"], RED_CIRCLE)]
    assert exact_share(scored) == 0.5
    summary = summarise(scored)
    assert summary.values == {"captions": 2, "exact_match": 0.5, "main_colour_and_shape_share": 1.0}
    assert summary.protocol == "" and summary.per_caption == [None, None]


def test_free_text_is_scored_by_cider_d_as_pycocoevalcap_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of photographs nobody writes the same sentence twice: equality would be 0.0 % of them. Words are split plainly
    here, as on machines without Java."""
    cider = pytest.importorskip("pycocoevalcap.cider.cider", reason="pycocoevalcap is not installed")

    def no_java(*_: object) -> None:
        raise MetricMissing("no Java")

    monkeypatch.setattr(metrics, "ptb_tokenize", no_java)
    free = [
        ("a dog runs on the beach", ["a dog runs along a beach", "the dog is running on sand"], {"image_id": 1}),
        ("two men are cooking", ["two men cook dinner together", "men in a kitchen"], {}),
        ("a cat", ["a cat sleeps on a sofa"], {"main_colour": "red"}),
    ]
    drawn = ("a red circle", ["a red circle"], RED_CIRCLE)
    summary = summarise([free[0], drawn, *free[1:]])
    references = {number: refs for number, (_, refs, _) in enumerate(free)}
    expected, of_each = cider.Cider().compute_score(references, {n: [text] for n, (text, _, _) in enumerate(free)})
    assert summary.values["cider_d"] == pytest.approx(expected, rel=1e-9)
    assert summary.values["exact_match"] == 1.0 and summary.values["captions"] == 4
    assert summary.per_caption[1] is None
    assert [one for one in summary.per_caption if one is not None] == pytest.approx(list(of_each), rel=1e-9)
    assert "document frequencies of these 3 images" in summary.protocol
    assert "tokenization: lower case, words and numbers only" in summary.protocol
    assert in_words("cider_d", 0.42581) == "0.426" and in_words("exact_match", 0.5) == "50.0 %"


def test_nothing_to_score() -> None:
    assert summarise([]).values == {"captions": 0}


def test_words_are_whole_words() -> None:
    assert first_mention("a colored ring", {"red", "ring"}) == "ring"
    assert first_mention("two circles", {"circle"}) is None
    assert normalise("  A cat .") == "a cat"
