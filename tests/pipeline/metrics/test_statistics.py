"""Standard errors and NLVR2's consistency against their definitions."""

from __future__ import annotations

import random

import numpy as np
import pytest

from pipeline.metrics.consistency import consistency, images_of, sentence_of
from pipeline.metrics.statistics import standard_error


def test_standard_error_of_independent_values() -> None:
    values = [0.0, 1.0, 1.0, 0.3, 0.9]
    expected = np.std(values, ddof=1) / np.sqrt(5)
    assert standard_error(values) == pytest.approx(expected, rel=1e-12)
    assert standard_error(values, [5, "a", 2, 3, None]) == pytest.approx(expected, rel=1e-12)
    assert standard_error([1.0]) is None and standard_error([]) is None
    assert standard_error([1.0, 0.0], ["one", "one"]) is None


def test_values_that_come_in_equal_groups() -> None:
    """Each of four values five times over: no more is known than from the four."""
    values = [0.0, 1.0, 1.0, 0.25]
    repeated = [value for value in values for _ in range(5)]
    groups = [group for group in "abcd" for _ in range(5)]
    assert standard_error(repeated, groups) == pytest.approx(standard_error(values), rel=1e-12)
    with pytest.raises(ValueError, match="20 values, 4 clusters"):
        standard_error(repeated, list("abcd"))


def definition(identifiers: list[str], correct: list[bool]) -> float:
    """nlvr2/eval/metrics.py of lil-lab/nlvr: fields by "-", the third emptied, one wrong example spoils the group."""
    groups: dict[str, bool] = {}
    for identifier, judged in zip(identifiers, correct):
        fields = identifier.split("-")
        fields[2] = ""
        name = "-".join(fields)
        groups.setdefault(name, True)
        if not judged:
            groups[name] = False
    return sum(groups.values()) / len(groups)


def test_consistency_is_the_definition() -> None:
    draws = random.Random(3)
    identifiers = [f"dev-{s}-{pair}-{sentence}" for s in range(30) for pair in range(4) for sentence in range(2)]
    draws.shuffle(identifiers)
    for share in (0.0, 0.5, 0.9, 1.0):
        correct = [draws.random() < share for _ in identifiers]
        found = consistency(identifiers, correct)
        assert sum(found.values()) / len(found) == definition(identifiers, correct)
        assert len(found) == 60


def test_identifiers() -> None:
    assert sentence_of("dev-850-3-1") == "dev-850-1" and images_of("dev-850-3-1") == "dev-850-3"
    assert consistency(["dev-1-0-0", "dev-1-1-0", "dev-1-0-1"], [True, False, True]) == {
        "dev-1-0": False,
        "dev-1-1": True,
    }
    for identifiers, reason in [
        (["dev-1-0-0", "dev-1-0-0"], "dev-1-0-0 is there twice"),
        (["dev-1-0", "dev-1-0-0"], "identifier 'dev-1-0': expected SPLIT-SET-PAIR-SENTENCE"),
        (["dev-1-0-0"], "1 identifiers, 2 judgements"),
    ]:
        with pytest.raises(ValueError, match=reason):
            consistency(identifiers, [True, True])
