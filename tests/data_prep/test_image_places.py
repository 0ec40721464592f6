"""Images in folders, zips and tars: found by name, read where they are, whatever else an archive holds."""

import io
import os
import random
import tarfile
import zipfile
from collections import Counter

import pytest

from data_prep import image_places
from data_prep.image_places import open_places
from data_prep.record import PrepError
from tests.data_prep.annotations.prepared import metas, picture, prepare, put, rejected, write_lines

CONTENT = {"top/VG_100K/1.jpg": picture(1), "top/VG_100K/2.jpg": picture(2), "top/b/2.jpg": picture(3)}


def write_tar(path, content, mode="w", pax=False):
    with tarfile.open(path, mode, format=tarfile.PAX_FORMAT if pax else tarfile.USTAR_FORMAT) as tar:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if pax:
                info.pax_headers = {"comment": "x" * 700}
            tar.addfile(info, io.BytesIO(data))
    return path


def write_zip(path, content, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def read(places, *names, limit=10**6):
    found = places.find(names)
    return None if found is None else found.read(limit)


def forms(folder):
    put(folder / "folder" / "x", b"")
    for name, data in CONTENT.items():
        put(folder / "folder" / name, data)
    return [
        folder / "folder",
        write_zip(folder / "a.zip", CONTENT),
        write_zip(folder / "stored.ZIP", CONTENT, zipfile.ZIP_STORED),
        write_tar(folder / "a.tar", CONTENT),
        write_tar(folder / "pax.tar", CONTENT, pax=True),
        write_tar(folder / "a.tar.gz", CONTENT, "w:gz"),
        write_tar(folder / "a.tgz", CONTENT, "w:gz"),
        write_tar(folder / "a.tar.bz2", CONTENT, "w:bz2"),
        write_tar(folder / "a.tar.xz", {f"./{name}": data for name, data in CONTENT.items()}, "w:xz"),
    ]


def test_every_kind_of_place_finds_the_same_files(tmp_path):
    for path in forms(tmp_path):
        with open_places([path]) as places:
            assert read(places, "top/VG_100K/2.jpg") == picture(2), path  # in another order than they lie in
            assert read(places, "1.jpg") == picture(1), path
            assert read(places, "VG_100K/2.jpg") == picture(2), path
            assert read(places, "gone.jpg", "b/2.jpg") == picture(3), path
            assert read(places, "2.jpg") is None, path  # two of that name: neither is taken
            assert read(places, "G_100K/1.jpg") is None, path
            found = places.find(["1.jpg"])
            assert (found.name, found.size, found.read(5)) == ("1.jpg", len(picture(1)), picture(1)[:6])


def test_two_archives_are_one_union(tmp_path):
    """Visual Genome comes in two; a likelier name in the second goes before a lesser one in the first."""
    one = write_zip(tmp_path / "images.zip", {"VG_100K/1.jpg": b"1"})
    two = write_tar(tmp_path / "images2.tar", {"VG_100K_2/2.jpg": b"2"})
    with open_places([one, two]) as places:
        assert [read(places, f"{n}.jpg", f"VG_100K/{n}.jpg", f"VG_100K_2/{n}.jpg") for n in (1, 2)] == [b"1", b"2"]


def test_nothing_but_plain_members_is_read(tmp_path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"secret")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("link.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE), ("dev.jpg", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(secret)
            tar.addfile(info)
        info = tarfile.TarInfo("../../secret.jpg")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"in"))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        link = zipfile.ZipInfo("link.jpg")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, str(secret))
        archive.writestr("/etc/secret.jpg", b"in")
    for path in ("a.tar", "a.zip"):
        with open_places([tmp_path / path]) as places:
            assert [read(places, name) for name in ("link.jpg", "hard.jpg", "dev.jpg")] == [None] * 3
            assert read(places, "secret.jpg") == b"in"  # the member's own bytes; its name leads nowhere
    os.symlink(tmp_path / "none", tmp_path / "dangling.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    with open_places([tmp_path]) as places:
        assert read(places, "dangling.jpg") is None and read(places, "pipe.jpg") is None


def test_reading_is_bounded_and_damage_is_an_error_of_one_member(tmp_path):
    path = write_zip(tmp_path / "bomb.zip", {"bomb.jpg": bytes(10**7), "good.jpg": b"good"})
    with open_places([path]) as places:
        assert places.find(["bomb.jpg"]).size == 10**7 and len(read(places, "bomb.jpg", limit=1000)) == 1001
    content = bytearray(write_zip(tmp_path / "a.zip", {"x.jpg": b"abcdefgh", "y.jpg": b"fine"}, 0).read_bytes())
    content[content.index(b"abcdefgh")] ^= 1
    (tmp_path / "a.zip").write_bytes(content)
    with open_places([tmp_path / "a.zip"]) as places:
        with pytest.raises(OSError, match="Bad CRC-32"):
            read(places, "x.jpg")
        assert read(places, "y.jpg") == b"fine"


def test_a_damaged_archive_is_refused_or_loses_members(tmp_path):
    """Whatever bytes change: one line, or an OSError that a record is rejected for."""
    chance = random.Random(2)
    whole = {
        "a.zip": write_zip(tmp_path / "a.zip", CONTENT).read_bytes(),
        "a.tar": write_tar(tmp_path / "a.tar", CONTENT, pax=True).read_bytes(),
        "a.tar.gz": write_tar(tmp_path / "a.tar.gz", CONTENT, "w:gz").read_bytes(),
    }
    outcomes = Counter()
    for name, content in whole.items():
        for _ in range(50):
            damaged = bytearray(content)
            for _ in range(chance.choice((1, 2, 8))):
                damaged[chance.randrange(len(damaged))] = chance.randrange(256)
            (tmp_path / name).write_bytes(damaged[: chance.choice((len(damaged), chance.randrange(len(damaged))))])
            try:
                with open_places([tmp_path / name]) as places:
                    read(places, "1.jpg")
                outcomes["read"] += 1
            except PrepError as error:
                assert "\n" not in str(error)
                outcomes["refused"] += 1
            except OSError as error:
                assert "\n" not in str(error)
                outcomes["member"] += 1
    assert min(outcomes[kind] for kind in ("read", "refused", "member")) > 0


def test_too_many_members_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(image_places, "MAX_MEMBERS", 2)
    for path in (write_zip(tmp_path / "a.zip", CONTENT), write_tar(tmp_path / "a.tar", CONTENT)):
        with pytest.raises(PrepError, match=r"a\.\w+: more than 2 members, expected"), open_places([path]):
            pass


def test_what_is_no_archive_is_one_line(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"<html>")
    (tmp_path / "a.tar.gz").write_bytes(b"<html>")
    (tmp_path / "a.rar").write_bytes(b"x")
    cut = write_tar(tmp_path / "cut.tar.gz", {"x.jpg": os.urandom(5000)}, "w:gz")
    cut.write_bytes(cut.read_bytes()[:2000])
    for name, expected in (
        ("a.zip", "cannot be read as an archive"),
        ("a.tar.gz", "cannot be read as an archive"),
        ("cut.tar.gz", "download it again"),
        ("a.rar", "expected a folder or an archive"),
        ("none.zip", "no such"),
        ("none", "no such folder or archive"),
    ):
        with pytest.raises(PrepError, match=expected) as caught, open_places([tmp_path / name]):
            pass
        assert "\n" not in str(caught.value)


def test_a_verb_reads_images_from_an_archive(tmp_path):
    """Pairs of NLVR2, the images of one in a zip, those of the other in a compressed tar, one member damaged."""
    row = {"sentence": "Both.", "label": "True", "synset": "x"}
    rows = [row | {"identifier": f"train-{n}-0-0", "directory": 4} for n in range(3)]
    path = write_lines(tmp_path / "train.json", rows)
    content = {
        f"images/train/4/train-{n}-0-img{side}.png": picture(2 * n + side, "PNG") for n in (0, 2) for side in (0, 1)
    }
    archive = bytearray(write_zip(tmp_path / "one.zip", content, 0).read_bytes())
    archive[archive.index(picture(5, "PNG")) + 60] ^= 1
    (tmp_path / "one.zip").write_bytes(archive)
    names = [f"train-1-0-img{side}.png" for side in (0, 1)]
    two = write_tar(tmp_path / "two.tar.gz", {name: picture(2 + n, "PNG") for n, name in enumerate(names)}, "w:gz")
    command = ["nlvr2", "--input", path, "--images", tmp_path / "one.zip", two, "--output", tmp_path / "out"]
    assert prepare(*command) == 0
    assert [meta["files"][0] for meta in metas(tmp_path / "out" / "train")] == [
        "train-0-0-img0.png",
        "train-1-0-img0.png",
    ]
    assert rejected(tmp_path / "out" / "train") == [("undecodable_image", "train-2-0", 1)]
