"""Line figures: where points and names stand, what is said of them, and colours that all eyes tell apart."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

import pipeline.reporting
from pipeline.reporting.figures import NUM_COLOURS, Mark, Series, draw, smoothed, ticks

STYLE = Path(pipeline.reporting.__file__).parent / "templates" / "style.css.j2"
# Full protanopia, deuteranopia and tritanopia on linear RGB: Machado, Oliveira, Fernandes, "A physiologically-based
# model for simulation of color vision deficiency", IEEE TVCG 15(6), 2009, table of severity 1.0.
EYES = {
    "usual": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def places(path: str) -> list[tuple[float, float]]:
    return [tuple(map(float, pair.split())) for pair in path.removeprefix("M").split("L")]


def paths(svg: ElementTree.Element, kind: str) -> list[str]:
    return [one.get("d") for one in svg.iter("path") if set(kind.split()) <= set((one.get("class") or "").split())]


def test_points_stand_in_proportion_and_every_line_is_named_at_its_end() -> None:
    svg = parsed(draw("Loss", [Series("one", [0, 10, 40], [4.0, 2.0, 0.0], 0), Series("two", [0, 40], [4.0, 3.9], 3)]))
    (first,), (second,) = (paths(svg, f"line c{colour}") for colour in (0, 3))
    (x0, y0), (x1, y1), (x2, y2) = places(first)
    assert (x1 - x0) / (x2 - x0) == pytest.approx(0.25, abs=1e-3) and (y1 - y0) / (y2 - y0) == pytest.approx(
        0.5, abs=2e-3
    )
    assert places(second)[0] == (x0, y0) and y2 > y0, "larger values are higher up"
    names = {one.find("title").text: float(one.get("y")) for one in svg.iter("text") if "name" in one.get("class", "")}
    assert names["two"] < names["one"] and names["one"] == pytest.approx(y2 + 4, abs=0.11)
    assert svg.get("role") == "img" and svg.get("aria-label") == "Loss by step: one 4 to 0, two 4 to 3.9"


def test_names_do_not_stand_on_each_other() -> None:
    ends = [1.0, 1.001, 1.002, 0.999, 1.0, 1.0]
    svg = parsed(draw("t", [Series(f"run {n}", [0, 1], [5.0, end], n) for n, end in enumerate(ends)]))
    heights = sorted(float(one.get("y")) for one in svg.iter("text") if "name" in one.get("class", ""))
    assert len(heights) == 6 and min(np.diff(heights)) >= 12.9 and heights[-1] < 230


def test_long_lines_are_thinned_without_losing_a_peak() -> None:
    values = np.sin(np.arange(20_000) / 300)
    values[12_345] = 9.0
    svg = parsed(draw("t", [Series("a", list(range(20_000)), list(values), 0)]))
    (line,) = paths(svg, "line")
    found = places(line)
    assert len(found) <= 402 and found == sorted(found, key=lambda one: one[0])
    assert min(y for _, y in found) < np.median([y for _, y in found]) - 100


def test_smoothing_is_drawn_over_the_values() -> None:
    noise = np.random.default_rng(0).normal(size=400)
    svg = parsed(draw("t", [Series("a", list(range(400)), list(noise), 0)], smooth=True))
    thin, thick = (np.array(places(one))[:, 1] for one in paths(svg, "line"))
    assert thick.std() < thin.std() / 2
    mean = smoothed([3.0, 5.0, 4.0], 0.5)
    assert mean == pytest.approx([3.0, (3 + 2 * 5) / 3, (3 + 2 * 5 + 4 * 4) / 7])


def test_marks_say_what_happened_and_foreign_text_stays_text() -> None:
    marks = [Mark(5, "resumed", "after <b>"), Mark(5.01, "went back"), Mark(99, "out of sight"), Mark(7, "", "x", 2)]
    html = str(
        draw("t", [Series("<script>", [0, 10], [1.0, 2.0], 0), Series("b", [0, 10], [1.0, 2.0], 1)], marks=marks)
    )
    svg = parsed(html)
    said = [one.text for one in svg.iter("title")]
    assert {"resumed: after <b>", "went back", "x", "<script>"} <= set(said) and "out of sight" not in said
    drawn = [one.find("text") is not None for one in svg.iter("g") if one.get("class") == "mark"]
    assert drawn == [True, False], "the second name would stand on the first"
    assert len(paths(svg, "flag c2")) == 1 and "<script" not in html and " id=" not in html


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (0.13, 0.48, [0.2, 0.3, 0.4]), (-3, 3, [-2, 0, 2]), (5, 5, [5]), (0, 1e6, None)],
)
def test_ticks_are_round(low: float, high: float, expected: list[float] | None) -> None:
    found = ticks(low, high, 6)
    assert 1 <= len(found) <= 7 and all(low <= one <= high for one in found)
    assert expected is None or found == pytest.approx(expected)


@pytest.mark.parametrize("eyes", EYES)
def test_colours_are_told_apart_by_all_eyes_on_light_and_dark(eyes: str) -> None:
    """CIE 1976 differences of at least 20, where 2.3 is just noticeable; contrast with the card of 3, as WCAG 2.1 asks
    of graphics (1.4.11)."""
    style = STYLE.read_text()
    for theme in re.findall(r":root \{(.*?)\}", style, re.DOTALL):
        colours = dict(re.findall(r"--(\w+): #(\w{6})", theme))
        lines = [linear(colours[f"s{number}"]) for number in range(NUM_COLOURS)]
        seen = [lab(np.array(EYES[eyes]) @ colour) for colour in lines]
        for one, other in itertools.combinations(range(NUM_COLOURS), 2):
            assert np.linalg.norm(seen[one] - seen[other]) > 20, (one, other)
        assert all(contrast(colour, linear(colours["card"])) > 3 for colour in lines)


def linear(colour: str) -> np.ndarray:
    """Linear RGB of six hexadecimal digits of sRGB (IEC 61966-2-1)."""
    values = np.array([int(colour[place : place + 2], 16) for place in (0, 2, 4)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    xyz = np.array(to_xyz) @ rgb.clip(0, 1) / np.sum(to_xyz, axis=1)
    x, y, z = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def contrast(one: np.ndarray, other: np.ndarray) -> float:
    darker, lighter = sorted(float(np.array([0.2126, 0.7152, 0.0722]) @ rgb) for rgb in (one, other))
    return (lighter + 0.05) / (darker + 0.05)
