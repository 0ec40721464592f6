"""SNLI-VE: small files of exactly the published schema, and images that other sets hold out."""

import pytest

from data_prep.annotations.annotated import AnnotatedSplit
from data_prep.annotations.published import PUBLISHED
from data_prep.annotations.snli_ve import LABELS, label_revision
from data_prep.manifest import read_manifest
from tests.data_prep.annotations.prepared import (
    metas,
    overlap,
    picture,
    prepare,
    put,
    rejected,
    write_json,
    write_lines,
)


def row(image, number, label="entailment", **more):
    return {
        "annotator_labels": [label, label, "neutral"],
        "captionID": f"{image}.jpg#{number}",
        "gold_label": label,
        "pairID": f"{image}.jpg#{number}r1{label[0]}",
        "sentence1": "The premise of the text, which the task does not use.",
        "sentence1_binary_parse": "( )",
        "sentence1_parse": "(ROOT)",
        "sentence2": f"Hypothesis {number}.",
        "sentence2_binary_parse": "( )",
        "sentence2_parse": "(ROOT)",
        "Flikr30kID": image,
        **more,
    }


def command(folder, *splits):
    files = [folder / f"snli_ve_{split}.jsonl" for split in splits]
    return ["snli_ve", "--input", *files, "--images", folder / "in", "--output", folder / "data" / "snli_ve"]


def test_hypotheses_are_rows_of_their_image_in_the_files_order(tmp_path, capsys):
    """The last line counts without a line feed; the identifier may have the image's suffix."""
    rows = [row("47", 3, "neutral"), row("36", 0), row("47", 1, "contradiction"), row("47.jpg", 2)]
    for number in (36, 47):
        put(tmp_path / "in" / "flickr30k_images" / f"{number}.jpg", picture(number))
    for split, end in (("dev", ""), ("test", "\r\n")):
        write_lines(tmp_path / f"snli_ve_{split}.jsonl", rows, end)
    assert prepare(*command(tmp_path, "dev", "test")) == 0
    printed = capsys.readouterr().out
    assert "snli_ve dev: 4 hypotheses (published: 17,858, 17,854 fewer), 2 images (published: 1,000" in printed
    assert "labels: dev other, test other" in printed
    for split in ("dev", "test"):
        first, second = metas(tmp_path / "data" / "snli_ve" / split)
        assert first == {
            "image_id": "47",
            "file": "47.jpg",
            "image_identities": ["flickr/47"],
            "label": ["neutral", "contradiction", "entailment"],
            "pair_id": ["47.jpg#3r1n", "47.jpg#1r1c", "47.jpg.jpg#2r1e"],
            "captions": ["Hypothesis 3.", "Hypothesis 1.", "Hypothesis 2."],
        }
        assert second["image_id"] == "36"
        assert read_manifest(tmp_path / "data" / "snli_ve" / split).provenance["arguments"]["label_revision"] == {
            "dev": "other",
            "test": "other",
        }


def test_the_published_label_counts_add_up():
    """Two published tables, one of hypotheses and one of labels, say the same."""
    for counts in PUBLISHED["snli_ve"].values():
        assert counts["hypotheses"] == sum(counts[label] for label in LABELS)


def test_labels_of_the_published_counts_are_the_original_ones():
    """Corrected labels keep the rows and change the labels' counts."""
    counts = dict(PUBLISHED["snli_ve"]["dev"])
    assert label_revision(AnnotatedSplit("dev", [], [], counts)) == "original"
    assert label_revision(AnnotatedSplit("test", [], [], counts)) == "other"
    counts["entailment"], counts["neutral"] = counts["entailment"] - 1665, counts["neutral"] + 1665
    assert label_revision(AnnotatedSplit("dev", [], [], counts)) == "other"


def test_what_cannot_be_used_is_named(tmp_path, capsys):
    rows = [row("47", 0), row("47", 0), row("47", 1, "-"), row("47", 2, "Neutral"), row("48", 0)]
    rows += [row("../47", 3), {k: v for k, v in row("47", 4).items() if k != "Flikr30kID"}]
    write_lines(tmp_path / "snli_ve_train.jsonl", rows)
    put(tmp_path / "in" / "47.jpg", picture(47))
    assert prepare(*command(tmp_path, "train")) == 0
    assert rejected(tmp_path / "data" / "snli_ve" / "train") == [
        ("duplicate_id", "snli_ve_train.jsonl line 2: 47.jpg#0r1e", 1),
        ("unknown_label", "snli_ve_train.jsonl line 3: 47.jpg#1r1-", 1),
        ("unknown_label", "snli_ve_train.jsonl line 4: 47.jpg#2r1N", 1),
        ("malformed_row", "snli_ve_train.jsonl line 6: ../47.jpg#3r1e", 1),
        ("malformed_row", "snli_ve_train.jsonl line 7: 47.jpg#4r1e", 1),
        ("missing_image", "48", 1),
    ]
    assert "gold_label '-', expected one of entailment, neutral, contradiction" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["hypotheses.jsonl", "snli_ve_val.jsonl"])
def test_a_split_must_be_known(tmp_path, capsys, name):
    write_lines(tmp_path / name, [row("47", 0)])
    put(tmp_path / "in" / "47.jpg", picture(47))
    arguments = ["snli_ve", "--input", tmp_path / name, "--images", tmp_path / "in", "--output", tmp_path / "out"]
    assert prepare(*arguments) == 2
    assert "its name ends in none of train, dev, test" in capsys.readouterr().err
    assert prepare(*arguments, "--split", "dev") == 0
    assert prepare(*arguments, "--split", "dev", "test") == 2
    assert "--split dev test: expected a name for each of the 1 --input" in capsys.readouterr().err


def test_leaks_between_sets_of_the_same_photographs_are_named(tmp_path, capsys):
    """Flickr30k's held-out photographs stand in SNLI-VE's training split, and Flickr8k's are among them."""
    write_lines(tmp_path / "snli_ve_train.jsonl", [row("47", 0), row("48", 0)])
    images = [
        {"filename": f"{n}.jpg", "imgid": n, "split": split, "sentids": [n], "sentences": [{"raw": "A.", "sentid": n}]}
        for n, split in ((47, "val"), (49, "test"), (50, "train"))
    ]
    karpathy = write_json(tmp_path / "dataset_flickr30k.json", {"dataset": "flickr30k", "images": images})
    for number in range(47, 51):
        put(tmp_path / "in" / f"{number}.jpg", picture(number))
    name = "49_0123456789.jpg"
    put(tmp_path / "f8k" / "images" / name, picture(49))
    put(tmp_path / "f8k" / "Flickr8k.token.txt", f"{name}#0\tA dog.\n".encode())
    put(tmp_path / "f8k" / "Flickr_8k.trainImages.txt", f"{name}\n".encode())
    data = tmp_path / "data"
    assert prepare(*command(tmp_path, "train")) == 0
    arguments = ["flickr30k", "--karpathy", karpathy, "--images", tmp_path / "in", "--output", data / "flickr30k"]
    assert prepare(*arguments) == 0
    assert prepare("flickr8k", "--input", tmp_path / "f8k", "--output", data / "flickr8k") == 0
    capsys.readouterr()
    assert overlap(data) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{data}/flickr8k/train and {data}/flickr30k/test: 1 images in both, such as flickr/49",
        f"{data}/snli_ve/train and {data}/flickr30k/dev: 1 images in both, such as flickr/47",
    ]
    assert overlap(data / "flickr30k") == 0
    assert "no image of a training split stands in a held-out one (3 splits compared)" in capsys.readouterr().out


def test_samples_that_do_not_name_their_image_are_counted(tmp_path, capsys):
    assert prepare("synth", "--output", tmp_path / "s", "--train", 3, "--dev", 2, "--test", 0, "--pair-share", 0) == 0
    capsys.readouterr()
    assert overlap(tmp_path) == 0
    assert "s/train: 3 samples do not say which image they hold; they are not compared" in capsys.readouterr().out
