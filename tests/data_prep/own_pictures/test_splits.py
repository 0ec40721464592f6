"""Splits of own pictures: drawn by content, the same every time, none without an image, no image in two."""

import hashlib
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.own_pictures import writing
from data_prep.own_pictures.splits import draw, folder_splits
from tests.data_prep.annotations.prepared import images, metas, picture, put, rejected
from tests.data_prep.own_pictures.test_forms import local, photos, prepared, table

DIGESTS = [hashlib.sha256(bytes([number])).digest() for number in range(60)]
SHARES = st.fixed_dictionaries({"dev": st.sampled_from([0, 0.05, 0.3]), "test": st.sampled_from([0, 0.05, 0.6])})


@given(st.lists(st.sampled_from(DIGESTS), unique=True), SHARES, st.integers(0, 50), st.data())
@settings(deadline=None)
def test_every_split_with_a_share_gets_an_image_that_can_be_used(contents, shares, seed, data):
    bad = set(data.draw(st.lists(st.sampled_from(contents), unique=True))) if contents else set()
    splits = draw(contents, shares, seed, lambda content: content not in bad)
    assert set(splits) == set(contents)
    assert splits == draw(sorted(contents, reverse=True), shares, seed, lambda content: content not in bad)
    usable = {split for content, split in splits.items() if content not in bad}
    wanted = ["train", *(split for split in ("dev", "test") if shares[split])][: len(set(contents) - bad)]
    assert usable >= set(wanted) and usable <= {"train", *wanted}
    if all(shares.values()) and len(set(contents) - bad) > 2:
        assert usable == {"train", "dev", "test"}


@given(st.integers(0, 50), st.integers(20, 40))
@settings(deadline=None)
def test_further_images_move_none(seed, count):
    shares = {"dev": 0.3, "test": 0.3}
    few, many = draw(DIGESTS[:count], shares, seed), draw(DIGESTS, shares, seed)
    if {*few.values()} == {"train", "dev", "test"}:
        moved = [content for content in few if few[content] != many[content]]
        assert len(moved) <= 2  # those that a split was given because it had none


def test_shares_are_kept_on_average():
    contents = [hashlib.sha256(str(number).encode()).digest() for number in range(4000)]
    splits = list(draw(contents, {"dev": 0.1, "test": 0.2}, 3).values())
    for split, share in (("dev", 0.1), ("test", 0.2)):
        assert abs(splits.count(split) / 4000 - share) < 5 * (share * (1 - share) / 4000) ** 0.5  # 5 deviations


def test_folders_are_splits_where_all_images_lie_in_such():
    assert folder_splits(["train/1.jpg", "Val/a/2.jpg"]) == {"train/1.jpg": "train", "Val/a/2.jpg": "dev"}
    assert folder_splits(["train/1.jpg", "2.jpg"]) == folder_splits(["train/1.jpg", "cats/2.jpg"]) == {}


def test_equal_bytes_under_two_names_stay_together(tmp_path):
    names = [f"{number}.jpg" for number in range(12)]
    photos(tmp_path / "photos", names)
    for number in range(12):
        put(tmp_path / "photos" / f"copy{number}.jpg", picture(20 * number))
    rows = [(name, "x y") for name in names] + [(f"copy{name}", "x y") for name in names]
    assert local(tmp_path, "--captions", table(tmp_path / "c.csv", rows), "--dev-share", 0.4) == 0
    train, dev = ({*prepared(tmp_path / "out", split)} for split in ("train", "dev"))
    assert dev and {f"copy{name}" for name in dev if name[0] != "c"} == {name for name in dev if name[0] == "c"}
    assert len(train | dev) == 24


@pytest.mark.parametrize("count, expected", [(1, [1, 0]), (2, [1, 1]), (10, [9, 1])])
def test_few_pictures_work(count, expected, tmp_path):
    names = [f"{number}.jpg" for number in range(count)]
    photos(tmp_path / "photos", names)
    captions = table(tmp_path / "c.csv", [(name, "a picture") for name in names])
    assert local(tmp_path, "--captions", captions, "--dev-share", 0.01) == 0
    found = [
        len(prepared(tmp_path / "out", split)) for split in ("train", "dev") if (tmp_path / "out" / split).exists()
    ]
    assert [*found, 0][:2] == expected


def test_a_column_of_splits_is_respected_and_a_copy_of_a_held_out_image_left_out_of_train(tmp_path, capsys):
    names = [f"{number}.jpg" for number in range(6)]
    photos(tmp_path / "photos", names)
    put(tmp_path / "photos" / "copy.jpg", picture(20 * 4))
    splits = ["train", "Train", "train", "val", "test", "somewhere"]
    rows = [(name, "a b", split) for name, split in zip(names, splits)] + [("copy.jpg", "a b", "train")]
    assert local(tmp_path, "--captions", table(tmp_path / "c.csv", rows, ("file", "caption", "split"))) == 0
    found = {split: [*prepared(tmp_path / "out", split)] for split in ("train", "dev", "test")}
    assert found == {"train": names[:3], "dev": ["3.jpg"], "test": ["4.jpg"]}
    assert sorted(rejected(tmp_path / "out" / "train")) == [
        ("held_out_image", "row 7: 'copy.jpg'", 1),
        ("unknown_split", "row 6: '5.jpg'", 1),
    ]
    assert "splits (the captions' own): train 3, dev 1, test 1" in capsys.readouterr().out


def test_dev_is_drawn_from_train_where_only_test_is_given(tmp_path, capsys):
    names = [f"{split}/{number}.jpg" for split in ("train", "test") for number in range(4)]
    photos(tmp_path / "photos", names)
    captions = table(tmp_path / "c.csv", [(name, "a b") for name in names])
    assert local(tmp_path, "--captions", captions) == 0
    assert {*prepared(tmp_path / "out", "test")} == {*names[4:]}
    assert len(prepared(tmp_path / "out", "dev")) == 1 and len(prepared(tmp_path / "out", "train")) == 3
    assert "folders, dev drawn from train" in capsys.readouterr().out


def everything(folder):
    return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def ten(tmp_path):
    names = [f"{number}.jpg" for number in range(10)]
    photos(tmp_path / "photos", names)
    return table(tmp_path / "c.csv", [(name, f"picture {name}") for name in names])


def test_equal_input_gives_equal_bytes_and_a_second_run_does_nothing(tmp_path, capsys):
    captions = ten(tmp_path)
    assert local(tmp_path, "--captions", captions, output="one/mine") == local(
        tmp_path, "--captions", captions, output="two/mine"
    )
    first = everything(tmp_path / "one")
    assert first == everything(tmp_path / "two")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*")}
    capsys.readouterr()
    assert local(tmp_path, "--captions", captions, output="one/mine") == 0
    said = capsys.readouterr().out
    assert "nothing to do" in said and "pipeline.generate --run runs/mine" in said
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*")}


@pytest.mark.parametrize("changed", ["captions", "images", "seed", "splits"])
def test_other_input_is_refused_by_name_and_replaced_when_asked_to(changed, tmp_path, capsys):
    captions = ten(tmp_path)
    assert local(tmp_path, "--captions", captions, "--test-share", 0.3) == 0
    options = ["--captions", captions, "--test-share", 0.3]
    if changed == "captions":
        put(captions, captions.read_bytes().replace(b"picture 3", b"another 3"))
    elif changed == "images":
        put(tmp_path / "photos" / "4.jpg", picture(999))
    elif changed == "seed":
        options += ["--seed", 4]
    else:
        options[-1] = 0
    before = everything(tmp_path / "out")
    assert local(tmp_path, *options) == 2
    error = capsys.readouterr().err
    assert changed in error and "--overwrite" in error and error.count("\n") == 1
    assert everything(tmp_path / "out") == before
    assert local(tmp_path, *options, "--overwrite") == 0
    assert (tmp_path / "out" / "test").exists() == (changed != "splits")
    assert len(prepared(tmp_path / "out")) == 10


@pytest.mark.parametrize("when", ["while it writes", "between two splits"])
def test_an_interrupted_run_leaves_nothing_that_refuses_the_next(when, tmp_path, monkeypatch):
    captions, put_in_place, calls = ten(tmp_path), writing.put_in_place, []

    def interrupted(*paths):
        calls.append(paths)
        if len(calls) == 2 or when == "while it writes":
            raise KeyboardInterrupt
        put_in_place(*paths)

    monkeypatch.setattr(writing, "put_in_place", interrupted)
    assert local(tmp_path, "--captions", captions) == 130
    monkeypatch.undo()
    left = [path.name for path in (tmp_path / "out").iterdir()] if (tmp_path / "out").exists() else []
    assert sorted(left) == (["README.md", "train"] if when == "between two splits" else [])
    assert local(tmp_path, "--captions", captions) == 0
    assert len(prepared(tmp_path / "out")) == 10


def test_a_held_out_image_that_does_not_decode_makes_room_for_another(tmp_path):
    """Of ten pictures one is held out; were it damaged, there would be no dev at all."""
    captions = ten(tmp_path)
    assert local(tmp_path, "--captions", captions) == 0
    [(name, _)] = prepared(tmp_path / "out", "dev").items()
    put(tmp_path / "photos" / name, (tmp_path / "photos" / name).read_bytes()[:-80])
    assert local(tmp_path, "--captions", captions, "--overwrite") == 0
    assert len(prepared(tmp_path / "out", "dev")) == 1 and name not in prepared(tmp_path / "out")


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    captions = ten(tmp_path)
    assert local(tmp_path, "--captions", captions, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "splits (drawn): train 9, dev 1" in said and "nothing was written" in said
    assert not (tmp_path / "out").exists()


def test_a_photograph_is_kept_as_it_is_and_an_animation_becomes_a_jpeg(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter, which is applied where pixels are read
    stream = io.BytesIO()
    Image.new("RGB", (40, 20), "red").save(stream, "JPEG", exif=exif)
    put(tmp_path / "photos" / "turned.jpg", stream.getvalue())
    for number, kind in enumerate(("gif", "bmp", "tiff")):
        put(tmp_path / "photos" / f"b.{kind}", picture(20 * number, kind.upper()))
    rows = [(name, "x y") for name in ("turned.jpg", "b.gif", "b.bmp", "b.tiff")]
    assert local(tmp_path, "--captions", table(tmp_path / "c.csv", rows), "--dev-share", 0) == 0
    kept = images(tmp_path / "out" / "train")
    assert kept["turned.jpg"] == stream.getvalue() and len(kept) == 4 and all(name.endswith(".jpg") for name in kept)
    assert [meta["image_identities"] for meta in metas(tmp_path / "out" / "train")][0] == [
        f"bytes/{hashlib.sha256(stream.getvalue()).hexdigest()}"
    ]
