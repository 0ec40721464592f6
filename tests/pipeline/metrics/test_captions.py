"""Caption metrics against pycocoevalcap called directly, on captions made to break its programs."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from pipeline.metrics import java
from pipeline.metrics.captions import METRICS, PTB, caption_scores
from pipeline.metrics.cider import DocumentFrequencies, cider_d
from pipeline.metrics.java import MetricMissing, ptb_tokenize, spice

PACKAGE = find_spec("pycocoevalcap") is not None
needs_package = pytest.mark.skipif(not PACKAGE, reason="pycocoevalcap is not installed: pip install pycocoevalcap==1.2")
needs_java = pytest.mark.skipif(not PACKAGE or not shutil.which("java"), reason="needs pycocoevalcap and Java")

PREDICTIONS = {  # ids that are neither sorted nor of one form
    391895: "A man riding a wave on top of a surfboard.",
    7: "a dog isn't running; it's asleep (in the U.S.A.)",
    "z.jpg": "",
    "a.jpg": "Two cafés — naïve, 1,000-2 people … 😀 “quoted”",
    12: "the the the the the the",
}
REFERENCES = {
    7: ["A dog that isn't awake.", "the dog, asleep", "It's a dog's life!"],
    391895: ["A man rides a wave.", "a surfer on a big wave", "A person is riding a wave on a surfboard"],
    12: ["the cat sat on the mat", "There is a cat."],
    "a.jpg": ["People in two cafés", 'a "quoted" café with 1,000 people'],
    "z.jpg": ["nothing is here", "..."],
}


def package_scores(predictions: dict[Any, str], references: dict[Any, list[str]], meteor: bool) -> dict[str, Any]:
    """{name: (value, {id: value})} by the package alone, put together like its eval.py."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenizer = PTBTokenizer()
    wanted = tokenizer.tokenize({key: [{"caption": text} for text in references[key]] for key in predictions})
    found = tokenizer.tokenize({key: [{"caption": text}] for key, text in predictions.items()})
    values, of_images = Bleu(4).compute_score(wanted, found, verbose=0)
    result = {f"bleu_{n + 1}": (values[n], dict(zip(wanted, of_images[n]))) for n in range(4)}
    scorers = {"rouge_l": Rouge(), "cider_d": Cider()} | ({"meteor": Meteor()} if meteor else {})
    for name, scorer in scorers.items():
        value, scores = scorer.compute_score(wanted, found)
        result[name] = (value, dict(zip(wanted, scores)))
    return result


def assert_equal(found: Any, expected: dict[str, Any]) -> None:
    assert found.values.keys() == expected.keys()
    for name, (value, of_images) in expected.items():
        assert found.values[name] == pytest.approx(float(value), abs=1e-6), name
        assert found.per_item[name] == pytest.approx({key: float(score) for key, score in of_images.items()}, abs=1e-6)


@pytest.mark.slow
@needs_java
def test_scores_are_the_packages() -> None:
    found = caption_scores(PREDICTIONS, REFERENCES, ("bleu", "rouge_l", "cider_d"))
    assert_equal(found, package_scores(PREDICTIONS, REFERENCES, meteor=False))
    assert found.tokenization == PTB and found.missing == []
    assert list(found.per_item["cider_d"]) == list(PREDICTIONS)
    again = caption_scores(PREDICTIONS, REFERENCES, ("bleu", "rouge_l", "cider_d"))
    assert again == found, "nothing accumulates from one call to the next"


@needs_java
@pytest.mark.extended
@pytest.mark.slow(60)
def test_meteor_is_the_packages_whatever_the_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = package_scores(PREDICTIONS, REFERENCES, meteor=True)["meteor"]
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")
    found = caption_scores(PREDICTIONS, REFERENCES, ("meteor",))
    assert_equal(found, {"meteor": expected})


@needs_java
def test_a_meteor_that_dies_says_why_and_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The package's own object waits for ever: for the lock under which its Java died."""
    monkeypatch.setattr(java, "package_folder", lambda: tmp_path)
    with pytest.raises(MetricMissing, match=r"^METEOR could not be started: .*meteor-1.5.jar"):
        java.meteor(["a dog runs"], [["the dog runs"]], timeout_seconds=60)
    (tmp_path / "meteor").mkdir()
    (tmp_path / "meteor" / "meteor-1.5.jar").write_bytes(b"no jar")
    with pytest.raises(MetricMissing, match=r"^METEOR ended with code 1: Error: Invalid or corrupt jarfile"):
        java.meteor(["a dog runs"], [["the dog runs"]], timeout_seconds=60)


@pytest.mark.slow
@needs_java
def test_line_breaks_of_every_kind_shift_no_caption() -> None:
    breaks = ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", "\t", "\u00a0"]
    texts = [f"A dog{mark}runs.{mark}" for mark in breaks]
    assert ptb_tokenize(["", *texts, "last", ""]) == ["", *["a dog runs"] * len(breaks), "last", ""]
    clean = caption_scores({1: "a dog runs", 2: "a cat"}, {1: ["the dog runs"], 2: ["one cat"]}, ("rouge_l",))
    broken = caption_scores({1: "a dog\u2028runs", 2: "a cat\r"}, {1: ["the\ndog runs"], 2: ["one cat"]}, ("rouge_l",))
    assert broken == clean


@needs_java
def test_a_lost_line_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(java, "_run", lambda *_, **__: "a\nb")
    with pytest.raises(AssertionError, match="3 captions became 2 lines"):
        ptb_tokenize(["a", "b", "c"])


@pytest.fixture
def fake_spice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """SPICE's program, which sorts its results by the text of the ids; returns the cache folders it was given."""
    (tmp_path / "spice" / "lib").mkdir(parents=True)
    (tmp_path / "spice" / "lib" / "stanford-corenlp-3.6.0-models.jar").touch()
    caches: list[Path] = []

    def program(command: list[str], *_: Any) -> str:
        caches.append(Path(command[command.index("-cache") + 1]))
        assert not list(caches[-1].iterdir())
        items = json.loads(Path(command[4]).read_text())
        scores = {"good": 0.5, "bad": 0.0, "silent": "NaN", "none": None}
        results = [
            {"image_id": item["image_id"], "scores": {"All": {"f": scores[item["test"]]}}}
            for item in sorted(items, key=lambda item: str(item["image_id"]), reverse=True)
        ]
        Path(command[command.index("-out") + 1]).write_text(json.dumps(results))
        return ""

    monkeypatch.setattr(java, "_run", program)
    monkeypatch.setattr(java, "_java", lambda: "java")
    monkeypatch.setattr(java, "package_folder", lambda: tmp_path)
    return caches


def test_spice_is_paired_by_image_and_cached_by_job(fake_spice: list[Path]) -> None:
    captions = ["bad"] * 9 + ["good"] + ["bad"] * 2
    assert spice(captions, [["x"]] * 12) == [0.0] * 9 + [0.5] + [0.0] * 2
    spice(captions, [["x"]] * 12)
    assert len(set(fake_spice)) == 2 and not any(folder.exists() for folder in fake_spice)


def test_undefined_spice_is_left_out_and_said(fake_spice: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.metrics.captions.ptb_tokenize", lambda texts, _: list(texts))
    predictions = {"p": "silent", "b": "good", "x": "none", "a": "bad"}
    found = caption_scores(predictions, dict.fromkeys(predictions, ["x"]), ("spice",))
    assert found.values == {"spice": 0.25} and found.per_item == {"spice": {"b": 0.5, "a": 0.0}}
    assert found.notes == ["SPICE of 2 of 4 images is undefined: they are left out of the mean"]
    found = caption_scores({"p": "silent"}, {"p": ["x"]}, ("spice",))
    assert found.values == {} and found.missing == ["spice: neither a caption nor a reference says anything"]


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(java, "find_spec", lambda _: None)
    found = caption_scores({1: "A dog!", 2: "a cat"}, {1: ["the dog"], 2: ["cat"]})
    assert found.values == {"cider_d": pytest.approx(cider_d(["A dog!", "a cat"], [["the dog"], ["cat"]]))}
    assert found.tokenization == (
        "lower case, words and numbers only; not the official PTB tokenization "
        "(pycocoevalcap is not installed: pip install pycocoevalcap==1.2)"
    )
    assert [line.partition(":")[0] for line in found.missing] == ["bleu", "rouge_l", "meteor", "spice"]
    assert all("pip install pycocoevalcap" in line and "\n" not in line for line in found.missing)


@needs_package
def test_without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    found = caption_scores({1: "A dog!", 2: "a cat"}, {1: ["the dog"], 2: ["cat"]})
    assert list(found.values) == ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d"]
    assert "not the official PTB tokenization (no `java` on the PATH" in found.tokenization
    assert found.missing[0].startswith("meteor: no `java`") and found.missing[1].startswith("spice: ")


def test_a_program_that_hangs_or_fails_is_a_line() -> None:
    with pytest.raises(MetricMissing, match=r"^METEOR had not ended after 0.2 s$"):
        java._run([sys.executable, "-c", "import time; time.sleep(100)"], "", 0.2, "METEOR")
    lines = ["Picked up JAVA_TOOL_OPTIONS: -D", "Exception: no heap", "\tat edu.anu.spice", ""]
    program = f"import sys; print(*{lines!r}, sep='\\n', file=sys.stderr); sys.exit(3)"
    with pytest.raises(MetricMissing, match="^SPICE ended with code 3: Exception: no heap$"):
        java._run([sys.executable, "-c", program], "", 60, "SPICE")
    with pytest.raises(MetricMissing, match="^PTB could not be started"):
        java._run(["/no/such/java"], "", 60, "PTB")


def test_what_makes_values_incomparable_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(java, "find_spec", lambda _: None)
    one = caption_scores({1: "a dog"}, {1: ["a dog"]}, ("cider_d",))
    assert one.values == {"cider_d": 0.0} and one.standard_errors == {"cider_d": None}
    assert "single image is 0" in one.notes[0]
    two = caption_scores({1: "a dog", 2: "a cat"}, {1: ["a dog"], 2: ["cat"]}, ("cider_d",))
    assert "frequencies of these 2 images" in two.notes[0]
    frequencies = DocumentFrequencies.of([[["a", "dog"]], [["cat"]], [["a", "bird"]]])
    fixed = caption_scores({1: "a dog"}, {1: ["a dog"]}, ("cider_d",), frequencies)
    assert fixed.values["cider_d"] > 0 and fixed.notes == ["CIDEr-D by fixed document frequencies of 3 images"]


@pytest.mark.parametrize(
    ("predictions", "references", "metrics", "reason"),
    [
        ({}, {}, METRICS, "no captions to score"),
        ({5: "a"}, {5: ["a"], 6: ["b"]}, METRICS, "image 6 has references but no caption"),
        ({5: "a", "x": "b"}, {5: ["a"]}, METRICS, "image 'x' has a caption but no references"),
        ({5: "a"}, {5: []}, METRICS, "image 5: references"),
        ({5: "a"}, {5: "a dog"}, METRICS, "image 5: references 'a dog', expected a list"),
        ({5: "a"}, {5: ["a"]}, ("cider",), "metric 'cider': expected some of bleu, rouge_l, cider_d"),
    ],
)
def test_bad_input(predictions: Any, references: Any, metrics: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        caption_scores(predictions, references, metrics)
