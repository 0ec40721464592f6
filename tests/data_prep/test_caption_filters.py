"""Captions by length and language; what preparing keeps, training reads."""

import io
import json

import pytest
from PIL import Image

from data_prep.__main__ import main
from data_prep.filters import REASONS, Limits, check_image, check_record
from data_prep.images import MAX_ASPECT, ImageProblem
from data_prep.manifest import read_manifest
from data_prep.record import Record
from pipeline.data.transforms import DEFAULT_MAX_PIXELS, decode_image

OTHERS = {
    "de": "Zwei Männer sitzen auf einer Bank und lesen Zeitung.",
    "fr": "Une femme avec un chapeau rouge se tient sur la plage.",
    "es": "Una mujer con sombrero rojo está en la playa.",
}
ENGLISH = ("a woman in a red hat stands on the beach", "two dogs run through the snow near a wooden fence")
UNTOLD = ("Hund", "chien", "IMG_2031", "12345", "!!", "Paris 2010")


def encoded(size, image_format="PNG"):
    stream = io.BytesIO()
    Image.new("RGB", size, "olive").save(stream, image_format)
    return stream.getvalue()


def kept(captions, **limits):
    """What stays of a record's captions, and the reasons of the others."""
    record = Record("k", (encoded((40, 30)),), tuple(captions), per_caption={"label": list(range(len(captions)))})
    found, rejections = check_record(record, Limits(**limits))
    assert all(one.reason in REASONS and one.rows == 1 for one in rejections)
    return (list(found.captions) if found else []), [one.reason for one in rejections], found


def test_words_are_counted_by_white_space():
    captions = ["one", " two  words ", "one two three", "a b c d"]
    stays, reasons, record = kept(captions, min_words=2, max_words=3)
    assert stays == ["two words", "one two three"] and reasons == ["too_few_words", "too_many_words"]
    assert record.per_caption == {"label": [1, 2]}
    assert kept(captions)[1] == []


def test_a_record_without_a_wanted_caption_goes():
    stays, reasons, record = kept(["one", "two"], min_words=2)
    assert record is None and reasons == ["too_few_words", "too_few_words"]


def test_languages():
    pytest.importorskip("py3langid", reason="pip install '.[language]'")
    for language, caption in OTHERS.items():
        assert kept([caption, *ENGLISH], languages=("en",))[:2] == (list(ENGLISH), ["other_language"])
        assert kept([caption, *ENGLISH], languages=("en", language))[1] == []
        assert kept([caption, *ENGLISH], languages=(language,))[1] == ["other_language"] * 2


def test_what_is_too_short_to_tell_stays():
    pytest.importorskip("py3langid", reason="pip install '.[language]'")
    assert kept(UNTOLD, languages=("en",)) [1] == []  # fmt: skip


@pytest.mark.slow(3)
def test_filters_on_the_command_line(tmp_path, capsys):
    pytest.importorskip("py3langid", reason="pip install '.[language]'")
    (tmp_path / "images").mkdir()
    names = [f"{number}_0123456789.jpg" for number in range(3)]
    said = [(ENGLISH[0], OTHERS["de"]), (OTHERS["fr"], "too short"), ("a man on a horse rides by", ENGLISH[1])]
    for name in names:
        (tmp_path / "images" / name).write_bytes(encoded((40, 30), "JPEG"))
    lines = [f"{name}#{n}\t{text}" for name, texts in zip(names, said) for n, text in enumerate(texts)]
    (tmp_path / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "Flickr_8k.trainImages.txt").write_text("\n".join(names) + "\n")
    options = ["--input", tmp_path, "--output", tmp_path / "out", "--workers", 1, "--min-words", 3]
    assert main([str(one) for one in ("flickr8k", *options, "--language", "en")]) == 0
    manifest = read_manifest(tmp_path / "out" / "train")
    assert manifest.rows == 3 and manifest.rejected == {"other_language": 2, "too_few_words": 1}
    examples = (tmp_path / "out" / "train" / "rejected.jsonl").read_text().splitlines()
    assert any("Bank" in json.loads(line)["detail"] for line in examples)
    assert manifest.provenance["arguments"]["languages"] == ["en"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(one) for one in ("flickr8k", *options, "--language", "english")])
    assert ended.value.code == 2 and "'english', expected ISO 639-1 codes" in capsys.readouterr().err


@pytest.mark.parametrize("size", [(MAX_ASPECT * 20, 20), (20, MAX_ASPECT * 20), (4000, 20), (20, 4000), (2001, 20)])
@pytest.mark.parametrize("image_size", [None, 16])
def test_what_preparing_keeps_training_reads(size, image_size):
    """An image of 4000x20 was kept, and then refused in training."""
    too_long = max(size) > MAX_ASPECT * min(size)
    try:
        content, _ = check_image(encoded(size), Limits(image_size=image_size))
    except ImageProblem as problem:
        assert too_long and problem.reason == "aspect_ratio"
    else:
        assert not too_long and min(decode_image(content).size) == (image_size or 20)


def test_preparing_takes_no_more_pixels_than_training():
    assert Limits.max_pixels <= DEFAULT_MAX_PIXELS
