"""The folder that is searched: what is in it, and that nothing outside of it is read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fastapi import HTTPException

from pipeline.serving.picture_folder import PictureFolder
from pipeline.serving.uploads import Limits
from tests.pipeline.serving.fake_model import FakeModel
from tests.pipeline.serving.serving import picture

LIMITS = Limits(100_000, 1_000_000, 1.0, 1)


def indexed(folder: Path) -> PictureFolder:
    found = PictureFolder(folder, LIMITS)
    for _ in found.indexing(FakeModel()):
        pass
    return found


def search(folder: PictureFolder, text: str, top: int = 10) -> list[tuple[str, float]]:
    return [(one.name, one.score) for one in list(folder.searching(text, top))[-1]]


def test_the_best_of_all_parts_come_first(tmp_path: Path) -> None:
    for number in range(70):  # more than two parts
        (tmp_path / f"{number:02}.png").write_bytes(picture("green" if number in (3, 40, 69) else "red"))
    folder = indexed(tmp_path)
    assert search(folder, "green", 4) == [("03.png", 1.0), ("40.png", 1.0), ("69.png", 1.0), ("00.png", 0.0)]
    steps = list(folder.searching("green", 2))
    assert len(steps) > 2 and steps[0][0].number == 3 and [one.number for one in steps[-1]] == [3, 40]


def test_only_regular_files_below_the_folder_are_read(tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "root"
    outside.mkdir()
    (root / "inner").mkdir(parents=True)
    (outside / "secret.png").write_bytes(picture("white"))
    (root / "inner" / "good.png").write_bytes(picture())
    (root / "link.png").symlink_to(outside / "secret.png")
    (root / "linked").symlink_to(outside)
    (root / "large.png").write_bytes(picture() + bytes(LIMITS.bytes))
    (root / "text.txt").write_text("x")
    os.mkfifo(root / "pipe.png")
    folder = indexed(root)
    assert folder.status() == {"total": 3, "indexed": 1, "refused": 2, "done": True}
    assert search(folder, "red") == [("inner/good.png", 1.0)]


@pytest.mark.parametrize("swap", ["file", "folder"])
def test_what_becomes_a_link_later_is_not_followed(tmp_path: Path, swap: str) -> None:
    outside, root = tmp_path / "outside", tmp_path / "root"
    outside.mkdir()
    (root / "inner").mkdir(parents=True)
    (outside / "a.png").write_bytes(picture("white"))
    (root / "inner" / "a.png").write_bytes(picture())
    folder = indexed(root)
    assert folder.jpeg(0, "small").startswith(b"\xff\xd8")
    (root / "inner" / "a.png").unlink()
    if swap == "file":
        (root / "inner" / "a.png").symlink_to(outside / "a.png")
    else:
        (root / "inner").rmdir()
        (root / "inner").symlink_to(outside)
    with pytest.raises(HTTPException, match="no longer there"):
        folder.jpeg(0, "small")


def test_a_picture_is_shown_without_what_its_file_holds_besides(tmp_path: Path) -> None:
    from PIL import Image

    image = Image.new("RGB", (400, 300), "red")
    exif = image.getexif()
    exif[0x010E] = "taken at home"
    image.save(tmp_path / "a.jpg", exif=exif)
    shown = indexed(tmp_path).jpeg(0, "small")
    assert b"taken at home" in (tmp_path / "a.jpg").read_bytes() and b"taken at home" not in shown


def test_names_that_are_no_utf8_are_shown_all_the_same(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(picture())
    ((name, _),) = search(indexed(tmp_path), "red")
    assert name.encode() and name.endswith(".png")
