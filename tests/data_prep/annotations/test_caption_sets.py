"""COCO's own captions and Visual Genome's regions: small files of exactly the published schema."""

import json
import zipfile

import pytest

from data_prep.manifest import read_manifest
from data_prep.record import Rejection
from data_prep.verbs import caption_sets
from tests.data_prep.annotations import test_karpathy
from tests.data_prep.annotations.prepared import metas, overlap, picture, prepare, put, rejected, write_json


def coco_image(number, split="train2014"):
    name = f"{number:012d}.jpg" if split.endswith("2017") else f"COCO_{split}_{number:012d}.jpg"
    return {
        "license": 5,
        "file_name": name,
        "coco_url": f"http://images.cocodataset.org/{split}/{name}",
        "height": 360,
        "width": 640,
        "date_captured": "2013-11-14 16:28:13",
        "flickr_url": f"http://farm4.staticflickr.com/3153/{number}_z.jpg",
        "id": number,
    }


def coco_file(folder, split, numbers, captions=2):
    annotations = [
        {"image_id": number, "id": 100 * number + k, "caption": f"Caption {k} of {number}.\n"}
        for k in range(captions)  # the captions of an image do not stand together
        for number in numbers
    ]
    content = {
        "info": {"description": "This is stable 1.0 version of the 2014 MS COCO dataset.", "year": 2014},
        "images": [coco_image(number, split) for number in numbers],
        "licenses": [{"id": 5, "name": "Attribution License", "url": "http://creativecommons.org/licenses/by/2.0/"}],
        "annotations": annotations,
    }
    return write_json(folder / f"captions_{split}.json", content)


def held_out_file(folder, *numbers):
    entries = [test_karpathy.coco_entry(number, "test") for number in numbers]
    return write_json(folder / "dataset_coco.json", {"images": entries, "dataset": "coco"})


@pytest.fixture
def coco(tmp_path):
    for split, numbers in (("train2014", (1, 2)), ("val2014", (3,))):
        for number in numbers:
            put(tmp_path / "coco" / split / coco_image(number, split)["file_name"], picture(number))
    return tmp_path, [coco_file(tmp_path, "train2014", (1, 2)), coco_file(tmp_path, "val2014", (3, 4))]


def test_cocos_own_captions(coco, capsys):
    folder, files = coco
    command = ["coco", "--captions", *files, "--images", folder / "coco", "--output", folder / "out"]
    assert prepare(*command) == 0
    printed = capsys.readouterr().out
    assert "coco captions train: 2 images (published: 82,783, 82,781 fewer), 4 captions (published: 414,113," in printed
    assert "coco captions dev: 2 images (published: 40,504, 40,502 fewer), 4 captions (published: 202,654," in printed
    assert metas(folder / "out" / "train")[0] == {
        "image_id": 1,
        "file": "COCO_train2014_000000000001.jpg",
        "image_identities": ["coco/1"],
        "sentence_id": [100, 101],
        "captions": ["Caption 0 of 1.", "Caption 1 of 1."],
    }
    assert rejected(folder / "out" / "dev") == [("missing_image", "COCO_val2014_000000000004", 2)]


def test_the_files_of_2017_from_zips_and_held_out_images(tmp_path):
    files = [coco_file(tmp_path, "train2017", (5, 6)), coco_file(tmp_path, "val2017", (7,))]
    for split, numbers in (("train2017", (5, 6)), ("val2017", (7,))):
        with zipfile.ZipFile(tmp_path / f"{split}.zip", "w") as archive:
            for number in numbers:
                archive.writestr(f"{split}/{number:012d}.jpg", picture(number))
    images = [tmp_path / "train2017.zip", tmp_path / "val2017.zip"]
    command = ["coco", "--captions", *files, "--images", *images, "--output", tmp_path / "out"]
    assert prepare(*command, "--held-out", held_out_file(tmp_path, 6, 9)) == 0
    train = read_manifest(tmp_path / "out" / "train")
    assert (train.rows, train.rejected) == (2, {"held_out_image": 2})
    assert read_manifest(tmp_path / "out" / "dev").rows == 2 and overlap(tmp_path / "out") == 0


def test_which_captions_of_coco_must_be_said(coco, capsys):
    folder, files = coco
    other = coco_file(folder, "train2017", (1,))
    odd = write_json(folder / "captions.json", {"images": [], "annotations": []})
    for more, expected in (
        ([], "give Karpathy's file by --karpathy, or COCO's own by --captions"),
        (["--captions", files[0], "--karpathy", files[0]], "give Karpathy's file"),
        (["--captions", files[0], other], "two files of one split (train2014 is train, train2017 is train)"),
        (["--captions", odd], "neither its name nor its images' say one of train2014"),
        (["--captions", folder / "none.json"], "no such file; download annotations_trainval2014.zip"),
        (["--captions", files[0]], "--images: none given"),
        (["--karpathy", files[0], "--download"], "Karpathy's file has no addresses"),
        (["--captions", files[0], "--download", "--images", folder], "--download and --images: give one"),
        (["--captions", files[0], "--download", "--drop-duplicates"], "--drop-duplicates: not with --download"),
    ):
        assert prepare("coco", *more, "--output", folder / "out") == 2
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1


def region(number, image_id, phrase="the clock is green", **more):
    place = {"x": 421, "y": 57, "width": 82, "height": 139}
    return {"region_id": number, "image_id": image_id, "phrase": phrase, **place, **more}


def vg_files(folder, regions=None):
    """Image 2 is image 9 of COCO; image 3 has no regions, image 4 no file, the file of image 5 is empty."""
    regions = regions or [
        {"id": 1, "regions": [region(10, 1), region(11, 1, "shade along the road", x=-1)]},
        {"id": 2, "regions": [region(20, 2, "a bus"), region(21, 2, " ")]},
        {"id": 3, "regions": []},
        {"id": 4, "regions": [region(40, 4)]},
        {"id": 5, "regions": [region(50, 5), region(51, 5)]},
        {"id": 6, "regions": [region(60, 6, "two men")]},
    ]
    data = [
        {
            "image_id": number,
            "url": f"https://cs.stanford.edu/people/rak248/VG_100K_2/{number}.jpg",
            "width": 800,
            "height": 600,
            "coco_id": 9 if number == 2 else None,
            "flickr_id": None,
        }
        for number in range(1, 7)
    ]
    return write_json(folder / "region_descriptions.json", regions), write_json(folder / "image_data.json", data)


def vg_command(folder, *more):
    regions, data = folder / "region_descriptions.json", folder / "image_data.json"
    return ["vg", "--regions", regions, "--image-data", data, "--output", folder / "out", *more]


def test_visual_genomes_two_archives_are_one_corpus(tmp_path, capsys):
    """An image is stored once, its regions are its captions, each with its box; empty and corrupt files are counted."""
    vg_files(tmp_path)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as one, zipfile.ZipFile(tmp_path / "images2.zip", "w") as two:
        one.writestr("VG_100K_2/1.jpg", picture(1))
        one.writestr("VG_100K_2/5.jpg", b"")
        two.writestr("VG_100K/2.jpg", picture(2))
        two.writestr("VG_100K/6.jpg", picture(6)[:300])
    images = ["--images", tmp_path / "images.zip", tmp_path / "images2.zip"]
    assert prepare(*vg_command(tmp_path, *images, "--held-out", held_out_file(tmp_path, 1))) == 0
    assert "vg train: 6 images (published: 108,077, 108,071 fewer), 8 captions" in capsys.readouterr().out
    first, second = metas(tmp_path / "out" / "train")
    assert first == {
        "image_id": 1,
        "source": "vg",
        "coco_id": None,
        "file": "1.jpg",
        "image_identities": ["visual_genome/1"],
        "region_id": [10, 11],
        "box": [[421, 57, 82, 139], [-1, 57, 82, 139]],
        "captions": ["the clock is green", "shade along the road"],
    }
    assert (second["captions"], second["box"]) == (["a bus"], [[421, 57, 82, 139]])
    assert second["image_identities"] == ["coco/9"]
    assert rejected(tmp_path / "out" / "train") == [
        ("empty_caption", "region_descriptions.json entry 2", 1),
        ("empty_caption", "vg_2", 1),
        ("missing_image", "vg_4", 1),
        ("empty_image", "vg_5", 2),
        ("truncated_image", "vg_6", 1),
    ]


def test_held_out_images_of_coco_are_left_out_of_visual_genome(tmp_path, capsys):
    vg_files(tmp_path)
    for number in (1, 2):
        put(tmp_path / "VG_100K" / f"{number}.jpg", picture(number))
    images = ["--images", tmp_path / "VG_100K"]
    assert prepare(*vg_command(tmp_path, *images)) == 2
    assert "give --held-out dataset_coco.json, or --keep-held-out" in capsys.readouterr().err
    assert prepare(*vg_command(tmp_path, *images, "--held-out", held_out_file(tmp_path, 9))) == 0
    train = read_manifest(tmp_path / "out" / "train")
    assert train.rejected["held_out_image"] == 2 and [m["image_id"] for m in metas(tmp_path / "out" / "train")] == [1]
    assert prepare(*vg_command(tmp_path, *images, "--keep-held-out", "--overwrite")) == 0
    assert [m["image_id"] for m in metas(tmp_path / "out" / "train")] == [1, 2]


def test_odd_regions_are_named(tmp_path):
    regions = [
        {"id": 1, "regions": [region(10, 1), region(10, 1), region(11, 2), region(12, 1, x="4"), {"phrase": "x"}]},
        {"id": 1, "regions": [region(13, 1), region(14, 1)]},
        {"id": 99, "regions": [region(15, 99)]},
        {"id": 2},
        "x",
    ]
    vg_files(tmp_path, regions)
    put(tmp_path / "VG_100K" / "1.jpg", picture(1))
    assert prepare(*vg_command(tmp_path, "--images", tmp_path, "--keep-held-out")) == 0
    assert rejected(tmp_path / "out" / "train") == [
        ("duplicate_id", "Visual Genome region 10", 1),
        ("other_image", "Visual Genome region 11", 1),
        ("malformed_row", "Visual Genome region 12", 1),
        ("malformed_row", "region_descriptions.json entry 0", 1),
        ("duplicate_id", "region_descriptions.json entry 1", 2),
        ("missing_image", "region_descriptions.json entry 2", 1),
        ("malformed_row", "region_descriptions.json entry 3", 1),
        ("malformed_row", "region_descriptions.json entry 4", 1),
    ]


def test_images_come_by_the_addresses_in_the_files(tmp_path, monkeypatch, coco):
    """One row for an image, all its captions with it, and beside them what is of each."""
    given = {}
    monkeypatch.setattr(caption_sets, "begin", lambda args: None)
    monkeypatch.setattr(
        caption_sets, "download_rows", lambda args, rows, request: given.update({args.split: (list(rows), request)})
    )
    vg_files(tmp_path)
    assert prepare(*vg_command(tmp_path, "--download", "--keep-held-out")) == 0
    rows, request = given["train"]
    assert json.loads(json.dumps(request)) == request
    assert [row.name for row in rows if isinstance(row, Rejection)] == ["region_descriptions.json entry 2", "vg_2"]
    second = next(row for row in rows if not isinstance(row, Rejection) and row.number == 1)
    assert second.url == "https://cs.stanford.edu/people/rak248/VG_100K_2/2.jpg" and second.captions == ("a bus",)
    assert second.extra["box"] == [[421, 57, 82, 139]] and second.extra["image_identities"] == ["coco/9"]
    folder, files = coco
    assert prepare("coco", "--captions", *files, "--download", "--output", folder / "out") == 0
    rows, _ = given["dev"]
    assert [row.url for row in rows] == [coco_image(n, "val2014")["coco_url"] for n in (3, 4)]
    assert rows[0].captions == ("Caption 0 of 3.", "Caption 1 of 3.") and rows[0].extra["sentence_id"] == [300, 301]
