"""CIDEr-D against the reference implementation's numbers and against what the formula says by hand."""

from __future__ import annotations

import pytest

from benchmarks.probes.cider import cider_d

CAPTIONS = [
    "a red kite over the beach",
    "two boys play chess in a park",
    "a dog",
    "a man is riding a wave on a surfboard",
]
REFERENCES = [
    ["a red kite flies over the beach", "someone flies a kite at the beach"],
    ["two boys play chess in a park", "children playing a board game in a park", "two boys at a table"],
    ["a brown dog runs across the field", "the dog is running"],
    ["a surfer rides a wave", "a man rides a wave on a board in the sea"],
]


def test_it_gives_the_reference_implementations_number() -> None:
    """2.7520784937340883 is what pycocoevalcap 1.2's Cider().compute_score gives for these captions."""
    assert cider_d(CAPTIONS, REFERENCES) == pytest.approx(2.7520784937340883, rel=1e-12)


def test_a_caption_equal_to_its_only_reference_has_the_highest_score() -> None:
    texts = ["A red kite, over the beach!", "two boys play chess", "the dog's brown field shines"]
    assert cider_d(texts, [[text.lower()] for text in texts]) == pytest.approx(10)
    worse = cider_d(["a red kite over the sea", *texts[1:]], [[text] for text in texts])
    assert 5 < worse < 10
    assert cider_d(["nothing said here", "?", ""], [[text] for text in texts]) == 0


def test_repeating_a_telling_word_is_not_rewarded() -> None:
    references = [["a red kite over the beach"], ["two boys play chess in a park"]]
    honest, cheater = (cider_d([text, "nothing"], references) for text in ("a red kite", "kite kite kite kite kite"))
    assert cheater < honest
    with pytest.raises(ValueError, match="no captions"):
        cider_d([], [])
