"""NLVR2: small files of exactly the published schema, and the real dev.json where it is at hand."""

import json
import os
from pathlib import Path

import pytest

from data_prep.annotations.nlvr2 import read_nlvr2
from data_prep.annotations.published import compare
from data_prep.manifest import read_manifest
from tests.data_prep.annotations.prepared import images, metas, overlap, picture, prepare, put, rejected, write_lines

REAL = Path(os.environ.get("OPENFLM_DATA", Path(__file__).resolve().parents[4] / "shared" / "data")) / "nlvr2/dev.json"


def row(identifier, label="True", sentence="The right image shows a dog.", **more):
    pair = identifier.rpartition("-")[0]
    return {
        "validation": {"61": label},
        "sentence": sentence,
        "left_url": f"https://h/{pair}/l.jpg",
        "writer": "61",
        "label": label,
        "right_url": f"https://h/{pair}/r.jpg",
        "synset": "beer bottle",
        "query": "some beer bottles38",
        "identifier": identifier,
        "extra_validations": {},
        **more,
    }


def pair_images(folder, pair, formats=("PNG", "JPEG"), first=0):
    for number, image_format in enumerate(formats):
        put(folder / f"{pair}-img{number}.png", picture(first + number, image_format))


def test_a_pair_is_stored_once_with_its_sentences(tmp_path, capsys):
    """Labels stay texts; the image's name is the identifier's without the sentence; some .png hold other formats."""
    rows = [row("dev-850-0-0", "False"), row("dev-850-1-0"), row("dev-850-0-1", "True", "Both show a cat.")]
    path = write_lines(tmp_path / "dev.json", rows, end="")
    pair_images(tmp_path / "images" / "dev", "dev-850-0", first=0)
    pair_images(tmp_path / "images" / "dev", "dev-850-1", first=2)
    output = tmp_path / "data" / "nlvr2"
    assert prepare("nlvr2", "--input", path, "--images", tmp_path, "--output", output) == 0
    assert "nlvr2 dev: 3 statements (published: 6,982, 6,979 fewer), 2 pairs" in capsys.readouterr().out
    first, second = metas(output / "dev")
    assert first == {
        "synset": "beer bottle",
        "files": ["dev-850-0-img0.png", "dev-850-0-img1.png"],
        "image_identities": ["nlvr2/https://h/dev-850-0/l.jpg", "nlvr2/https://h/dev-850-0/r.jpg"],
        "label": ["False", "True"],
        "identifier": ["dev-850-0-0", "dev-850-0-1"],
        "captions": ["The right image shows a dog.", "Both show a cat."],
    }
    assert second["label"] == ["True"]
    stored = images(output / "dev")
    assert stored["dev-850-0.0.png"] == picture(0, "PNG") and stored["dev-850-0.1.jpg"] == picture(1, "JPEG")
    assert read_manifest(output / "dev").num_images == 2


@pytest.mark.parametrize("place", ["", "24", "train", "train/24", "images/train/24"])
def test_training_images_lie_in_numbered_folders(tmp_path, place):
    path = write_lines(tmp_path / "train.json", [row("train-10171-0-0", directory=24)])
    pair_images(tmp_path / "in" / place, "train-10171-0")
    command = ("nlvr2", "--input", path, "--images", tmp_path / "in", "--output", tmp_path / "out")
    assert prepare(*command) == 0 and read_manifest(tmp_path / "out" / "train").rows == 1


def test_balanced_and_unbalanced_lists(tmp_path, capsys):
    rows = [row(f"test1-{n}-0-0") for n in range(3)]
    path = write_lines(tmp_path / "test1.json", rows)
    lists = [write_lines(tmp_path / f"{name}.json", rows[n : n + 1]) for n, name in enumerate(("bal", "unb"))]
    for number in range(3):
        pair_images(tmp_path / "in", f"test1-{number}-0", first=2 * number)
    command = ["nlvr2", "--input", path, "--images", tmp_path / "in", "--output", tmp_path / "out"]
    assert prepare(*command, "--balanced", lists[0], "--unbalanced", lists[1]) == 0
    assert "1 balanced (published: 2,316, 2,315 fewer), 1 unbalanced (published: 3,536" in capsys.readouterr().out
    assert [meta["subset"] for meta in metas(tmp_path / "out" / "test")] == [["balanced"], ["unbalanced"], [None]]
    other = write_lines(tmp_path / "other.json", [row("test1-9-0-0")])
    assert prepare(*command, "--balanced", other, "--overwrite") == 2
    assert "other.json: test1-9-0-0 is not in test1.json" in capsys.readouterr().err


def test_what_cannot_be_used_is_named(tmp_path, capsys):
    good = row("dev-1-0-0")
    rows = [
        good,
        {**good, "sentence": "again"},
        row("dev-1-0-1", label=True),
        row("dev-1-0-2", label="true"),
        row("dev-1-0-3", left_url="https://elsewhere"),
        row("test1-1-0-0"),
        row("dev-1-0"),
        row("dev-2-0-0"),
        row("dev-3-0-0"),
        {key: value for key, value in row("dev-1-0-4").items() if key != "sentence"},
        [1],
    ]
    path = write_lines(tmp_path / "dev.json", rows)
    put(path, b"\xef\xbb\xbf" + path.read_bytes() + b"\n{\n\xff\xfe\n")
    pair_images(tmp_path / "in", "dev-1-0")
    put(tmp_path / "in" / "dev-2-0-img0.png", picture(5, "PNG"))  # the other image of the pair is not there
    pair_images(tmp_path / "in", "dev-3-0")
    put(tmp_path / "in" / "dev-3-0-img1.png", b"<html>")
    assert prepare("nlvr2", "--input", path, "--images", tmp_path / "in", "--output", tmp_path / "out") == 0
    assert rejected(tmp_path / "out" / "dev") == [
        ("duplicate_id", "dev-1-0-0", 1),
        ("unknown_label", "dev-1-0-1", 1),
        ("unknown_label", "dev-1-0-2", 1),
        ("other_image", "dev-1-0-3", 1),
        ("unknown_split", "test1-1-0-0", 1),
        ("malformed_row", "dev-1-0", 1),
        ("malformed_row", "dev-1-0-4", 1),
        ("malformed_row", "dev.json line 11", 1),
        ("malformed_row", "dev.json line 13", 1),
        ("invalid_utf8", "dev.json line 14", 1),
        ("missing_image", "dev-2-0", 1),
        ("not_an_image", "dev-3-0", 1),
    ]
    assert read_manifest(tmp_path / "out" / "dev").rows == 1
    printed = capsys.readouterr().out
    assert 'unknown_label: dev-1-0-1 (label True, expected the text "True" or "False"), and 1 more rows' in printed
    assert "missing_image: dev-2-0 (no dev-2-0-img1.png in" in printed


def test_no_image_at_all_is_one_line_that_names_one(tmp_path, capsys):
    path = write_lines(tmp_path / "dev.json", [row("dev-1-0-0"), row("dev-2-0-0")])
    command = ["nlvr2", "--input", path, "--images", tmp_path, "--output", tmp_path / "out"]
    assert prepare(*command) == 2
    error = capsys.readouterr().err
    assert "(2 missing_image, such as dev-1-0 (no dev-1-0-img0.png in " in error and error.count("\n") == 1
    assert prepare(*command, "--check") == 0
    put(path, b"\n\n")
    assert prepare(*command) == 2 and "no line holds a JSON object, expected NLVR2" in capsys.readouterr().err


def test_images_of_a_training_pair_in_dev_are_found(tmp_path, capsys):
    for split in ("train", "dev"):
        rows = [row(f"{split}-1-0-0", left_url="https://h/same.jpg")]
        path = write_lines(tmp_path / f"{split}.json", rows)
        pair_images(tmp_path / "in", f"{split}-1-0")
        prepare("nlvr2", "--input", path, "--images", tmp_path / "in", "--output", tmp_path / "out")
    capsys.readouterr()
    assert overlap(tmp_path / "out") == 1
    assert "1 images in both, such as nlvr2/https://h/same.jpg" in capsys.readouterr().out


def test_the_published_dev_file():
    """The file itself; counts by another way of reading it."""
    if not REAL.is_file():
        pytest.skip(f"no {REAL}: set OPENFLM_DATA to a folder that holds nlvr2/dev.json")
    annotated = read_nlvr2(REAL)
    rows = [json.loads(line) for line in REAL.read_text().splitlines()]
    assert compare("nlvr2", "dev", annotated.counts).startswith("6,982 statements (as published)")
    assert not annotated.problems and annotated.rows == len(rows) == 6982
    labels = {row["identifier"]: row["label"] for row in rows}
    of_pair = {pair.key: pair for pair in annotated.images}
    assert len(of_pair) == len({identifier.rpartition("-")[0] for identifier in labels})
    found = {}
    for pair in of_pair.values():
        found |= dict(zip(pair.per_caption["identifier"], pair.per_caption["label"], strict=True))
    assert found == labels
