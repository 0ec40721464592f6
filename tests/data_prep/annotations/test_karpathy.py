"""COCO and Flickr30k in Karpathy's splits: small files of exactly the published schema."""

import pytest

from data_prep.manifest import read_manifest
from tests.data_prep.annotations.prepared import images, metas, overlap, picture, prepare, put, rejected, write_json


def coco_entry(number, split, captions=("A dog runs.", "Ein Hund.\n"), folder="val2014"):
    ids = [100 * number + k for k in range(len(captions))]
    return {
        "filepath": folder,
        "sentids": ids,
        "filename": f"COCO_{folder}_{number:012d}.jpg",
        "imgid": number - 1,
        "split": split,
        "sentences": [
            {"tokens": text.lower().split(), "raw": text, "imgid": number - 1, "sentid": one}
            for one, text in zip(ids, captions, strict=True)
        ],
        "cocoid": number,
    }


def flickr_entry(number, split):
    entry = coco_entry(number, split)
    del entry["filepath"], entry["cocoid"]
    return entry | {"filename": f"{number}.jpg"}


@pytest.fixture
def coco(tmp_path):
    entries = [
        coco_entry(1, "test"),
        coco_entry(2, "restval", ["One.", "Two.", "Three.", "Four.", "Five.", "Six."]),
        coco_entry(3, "val"),
        coco_entry(4, "train", folder="train2014"),
    ]
    for entry in entries:
        put(tmp_path / "coco" / entry["filepath"] / entry["filename"], picture(entry["cocoid"]))
    return write_json(tmp_path / "dataset_coco.json", {"images": entries, "dataset": "coco"}), entries


def command(path, verb="coco", *more):
    folder = path.parent
    return [verb, "--karpathy", path, "--images", folder / "coco", "--output", folder / "data" / verb, *more]


def test_restval_belongs_to_train(coco, capsys):
    path, _ = coco
    assert prepare(*command(path)) == 0
    printed = capsys.readouterr().out
    assert "coco train: 2 images (published: 113,287, 113,285 fewer), 8 captions" in printed
    assert "coco test: 1 images (published: 5,000, 4,999 fewer), 2 captions (published: 25,010," in printed
    output = path.parent / "data" / "coco"
    train, dev, test = (metas(output / split) for split in ("train", "dev", "test"))
    assert [meta["karpathy_split"] for meta in train] == ["restval", "train"]
    assert test == [
        {
            "image_id": 1,
            "karpathy_split": "test",
            "file": "COCO_val2014_000000000001.jpg",
            "image_identities": ["coco/1"],
            "sentence_id": [100, 101],
            "captions": ["A dog runs.", "Ein Hund."],
        }
    ]
    assert len(train[0]["captions"]) == 6 and len(dev) == 1
    assert images(output / "test") == {"COCO_val2014_000000000001.jpg": picture(1)}
    assert overlap(output) == 0


def test_restval_can_be_left_out(coco, capsys):
    path, _ = coco
    assert prepare(*command(path, "coco", "--without-restval")) == 0
    assert "coco train: 1 images (published: 82,783, 82,782 fewer), 2 captions (published: 414,113" in (
        capsys.readouterr().out
    )
    assert read_manifest(path.parent / "data" / "coco" / "train").rows == 2


@pytest.mark.parametrize("place", ["{name}", "val2014/{name}", "000000000001.jpg", "val2014/000000000001.jpg"])
def test_either_layout_of_coco_is_found(tmp_path, place):
    entry = coco_entry(1, "val")
    path = write_json(tmp_path / "d.json", {"images": [entry], "dataset": "coco"})
    put(tmp_path / "coco" / place.format(name=entry["filename"]), picture(1))
    assert prepare(*command(path)) == 0 and read_manifest(tmp_path / "data" / "coco" / "dev").rows == 2


def test_flickr30k_has_no_folders_and_no_coco_ids(tmp_path):
    entries = [flickr_entry(1000092795, "train"), flickr_entry(36979, "test")]
    path = write_json(tmp_path / "dataset_flickr30k.json", {"images": entries, "dataset": "flickr30k"})
    put(tmp_path / "coco" / "1000092795.jpg", picture(1))
    put(tmp_path / "coco" / "flickr30k_images" / "36979.jpg", picture(2))
    assert prepare(*command(path, "flickr30k")) == 0
    (meta,) = metas(tmp_path / "data" / "flickr30k" / "test")
    assert (meta["image_id"], meta["file"], meta["image_identities"]) == (36978, "36979.jpg", ["flickr/36979"])


def test_what_cannot_be_used_is_named(coco, capsys):
    """Captions of images that are not there, ids that come twice, sentences that are announced and absent."""
    path, entries = coco
    lacking = coco_entry(5, "val")
    lacking["sentences"].pop()
    twice = coco_entry(6, "val")
    twice["sentences"][1]["sentid"] = 600
    outside = coco_entry(7, "val") | {"filename": "../7.jpg"}
    blank = coco_entry(8, "val", ["Eight.", " \n", "Ocho."])
    entries += [lacking, twice, outside, blank, coco_entry(9, "val"), coco_entry(10, "dev")]
    entries += [coco_entry(3, "val"), {"split": "val"}, "x"]
    for number in (5, 6, 8):
        put(path.parent / "coco" / "val2014" / f"COCO_val2014_{number:012d}.jpg", picture(number))
    write_json(path, {"images": entries, "dataset": "coco"})
    assert prepare(*command(path)) == 0
    dev = path.parent / "data" / "coco" / "dev"
    assert rejected(dev) == [
        ("captions_missing", "COCO_val2014_000000000005.jpg", 1),
        ("duplicate_id", "COCO_val2014_000000000006.jpg sentence 1", 1),
        ("captions_missing", "COCO_val2014_000000000006.jpg", 1),
        ("duplicate_id", "COCO_val2014_000000000003.jpg", 2),
        ("empty_caption", "COCO_val2014_000000000008", 1),
        ("missing_image", "COCO_val2014_000000000009", 2),
    ]
    assert rejected(dev.parent / "train") == [
        ("malformed_row", "dataset_coco.json image 6", 2),
        ("unknown_split", "COCO_val2014_000000000010.jpg", 2),
        ("malformed_row", "dataset_coco.json image 11", 1),
        ("malformed_row", "dataset_coco.json image 12", 1),
    ]
    eight = next(meta for meta in metas(dev) if meta["image_id"] == 8)
    assert (eight["captions"], eight["sentence_id"]) == (["Eight.", "Ocho."], [800, 802])
    assert "captions_missing: COCO_val2014_000000000005.jpg (its sentids name 501, which its sentences lack)" in (
        capsys.readouterr().out
    )


def test_a_file_of_another_set_is_refused(coco, capsys):
    path, entries = coco
    assert prepare(*command(path, "flickr30k")) == 2
    assert "`dataset` is 'coco', expected 'flickr30k'; use the verb of that name" in capsys.readouterr().err
    write_json(path, {"dataset": "coco"})
    assert prepare(*command(path)) == 2 and "no list `images`" in capsys.readouterr().err
