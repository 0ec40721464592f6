"""Reading rows of shards: what was written comes back, and every kind of damage gets its name."""

from __future__ import annotations

import io
import json
import os
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.manifest import Manifest, ManifestError, Shard, index_columns, write_manifest
from data_prep.record import Record
from data_prep.shard_writer import SplitWriter
from pipeline.data import shard_files
from pipeline.data.shard_files import LostCorpus
from pipeline.data.shard_reader import Corpus, RawSample
from pipeline.data.transforms import UnusableSample

FIELDS = ("image", "text", "meta")


def jpeg(number: int, width: int = 24, height: int = 16) -> bytes:
    """A small picture that differs from number to number."""
    colour = (number * 37 % 256, number * 91 % 256, number * 53 % 256)
    stream = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def records(count: int, captions: int = 1, images: int = 1) -> list[Record]:
    return [
        Record(
            key=f"k{number:04d}",
            images=tuple(jpeg(number * images + i) for i in range(images)),
            captions=tuple(f"caption {c} of picture number {number}" for c in range(captions)),
            meta={"number": number},
            extensions=("jpg",) * images,
        )
        for number in range(count)
    ]


def write_split(split_dir: Path, rows: list[Record], samples_per_shard: int = 4, corpus: str = "toy") -> Path:
    num_images = len(rows[0].images)
    with SplitWriter(split_dir, corpus, split_dir.name, num_images, samples_per_shard) as writer:
        for record in rows:
            writer.add(record)
    return split_dir


def write_raw_split(
    split_dir: Path, samples: list[dict[str, tuple[str, bytes] | tarfile.TarInfo]], corpus: str = "toy"
) -> Path:
    """One shard with any members whatever: per sample, field -> (member name, content) or a header without content."""
    split_dir.mkdir(parents=True)
    columns, stream, index = index_columns(FIELDS), io.BytesIO(), []
    for members in samples:
        row = [-1] * columns.width
        row[columns.caption] = 0
        for field, member in members.items():
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member[0])
            content = b"" if isinstance(member, tarfile.TarInfo) else member[1]
            info.size = len(content)
            stream.write(info.tobuf(tarfile.USTAR_FORMAT))
            row[columns.offset[field]], row[columns.size[field]] = stream.tell(), len(content)
            stream.write(content + b"\0" * (-len(content) % 512))
        index.append(row)
    stream.write(b"\0" * 1024)
    (split_dir / "00000.tar").write_bytes(stream.getvalue())
    np.save(split_dir / "00000.index.npy", np.array(index, dtype=np.int64))
    shard = Shard("00000.tar", "00000.index.npy", len(index), len(samples), len(stream.getvalue()), "0" * 64, "0" * 64)
    write_manifest(split_dir, Manifest(corpus, split_dir.name, FIELDS, (shard,)))
    return split_dir


def reason_of(corpus: Corpus, index: int) -> tuple[str, str]:
    with pytest.raises(UnusableSample) as caught:
        corpus.read(index)
    return caught.value.key, caught.value.reason


def test_rows_come_back_as_written(tmp_path):
    rows = records(10, captions=3)
    corpus = Corpus(write_split(tmp_path / "train", rows))
    assert len(corpus) == 30 and corpus.num_images == 1 and len(corpus.manifest.shards) == 3
    for index in (29, 0, 13, 14, 28):
        record, caption = rows[index // 3], rows[index // 3].captions[index % 3]
        meta = {"number": index // 3, "captions": [*record.captions]}
        expected = RawSample(record.key, list(record.images), caption, meta, index % 3)
        assert corpus.read(index) == expected
        assert corpus.read_text(index) == caption
    with pytest.raises(IndexError):
        corpus.read(30)
    with pytest.raises(IndexError):
        corpus.read(-1)


def test_image_pairs(tmp_path):
    rows = records(3, images=2)
    corpus = Corpus(write_split(tmp_path / "train", rows))
    assert corpus.num_images == 2 and corpus.read(2).images == list(rows[2].images) and corpus.read(2).key == "k0002"


def test_caption_falls_back_to_the_text_member(tmp_path):
    folder = write_raw_split(
        tmp_path / "train", [{"image": ("a.jpg", jpeg(0)), "text": ("a.txt", "zwölf Boote".encode())}]
    )
    assert Corpus(folder).read(0) == RawSample("a", [jpeg(0)], "zwölf Boote", {})


def meta(value: object) -> tuple[str, bytes]:
    return "a.json", json.dumps(value).encode()


def special(kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo("a.jpg")
    info.type, info.linkname = kind, "/etc/passwd"
    return info


@pytest.mark.parametrize(
    "members, reason",
    [
        ({"meta": meta({"captions": ["x"]})}, "missing image"),
        ({"image": ("a.jpg", b"1")}, "missing caption"),
        ({"image": ("a.jpg", b"1"), "meta": meta({"captions": []})}, "missing caption"),
        ({"image": ("a.jpg", b"1"), "meta": meta({"captions": [7]})}, "missing caption"),
        ({"image": ("a.jpg", b"1"), "meta": meta({"captions": [" \n\u3000"]})}, "empty caption"),
        ({"image": ("a.jpg", b"1"), "text": ("a.txt", b"")}, "empty caption"),
        ({"image": ("a.jpg", b"1"), "text": ("a.txt", b"caf\xe9")}, "invalid UTF-8"),
        ({"image": ("a.jpg", b"1"), "meta": meta({"captions": ["\ud800"]})}, "invalid UTF-8"),
        ({"image": ("a.jpg", b"1"), "meta": ("a.json", b"\xff{}")}, "invalid UTF-8"),
        ({"image": ("a.jpg", b"1"), "meta": ("a.json", b"{")}, "invalid metadata"),
        ({"image": ("a.jpg", b"1"), "meta": ("a.json", b"[" * 100_000)}, "invalid metadata"),
        ({"image": ("a.jpg", b"1"), "meta": meta(["captions"])}, "invalid metadata"),
        ({"image": ("../a.jpg", b"1"), "text": ("a.txt", b"x")}, "bad key"),
        ({"image": ("sub/a.jpg", b"1"), "text": ("a.txt", b"x")}, "bad key"),
        ({"image": (".jpg", b"1"), "text": ("a.txt", b"x")}, "bad key"),
        ({"image": special(tarfile.SYMTYPE), "text": ("a.txt", b"x")}, "not a regular file"),
        ({"image": special(tarfile.LNKTYPE), "text": ("a.txt", b"x")}, "not a regular file"),
    ],
)
def test_damage_inside_a_sample_is_named(tmp_path, members, reason):
    """Invariants 7 and 8."""
    corpus = Corpus(write_raw_split(tmp_path / "train", [members]))
    assert reason_of(corpus, 0)[1] == reason


def change_index(folder: Path, field: str, which: str, value: int) -> None:
    path = folder / "00000.index.npy"
    index = np.load(path)
    columns = index_columns(FIELDS)
    index[1, getattr(columns, which)[field]] = value
    np.save(path, index)


@pytest.mark.parametrize(
    "which, value, reason",
    [
        ("offset", 10**9 // 512 * 512, "index does not fit shard"),
        ("offset", 0, "index does not fit shard"),
        ("offset", 513, "index does not fit shard"),
        ("offset", -512, "index does not fit shard"),
        ("offset", 1024, "index does not fit shard"),
        ("size", 5, "index does not fit shard"),
        ("size", -5, "index does not fit shard"),
        ("size", 2**62, "member too large"),
    ],
)
def test_index_that_points_elsewhere_is_named(tmp_path, which, value, reason):
    """Invariants 7 and 8: the neighbours of the bad row stay readable."""
    folder = write_split(tmp_path / "train", records(3))
    change_index(folder, "image", which, value)
    corpus = Corpus(folder)
    assert reason_of(corpus, 1)[1] == reason
    assert corpus.read(0).key == "k0000" and corpus.read(2).key == "k0002"


def test_shards_that_vanish_or_shrink_after_opening(tmp_path, clock):
    """Invariant 8: damage of a shard is named by shard and row."""
    folder = write_split(tmp_path / "train", records(8))
    corpus = Corpus(folder)
    (folder / "00001.tar").unlink()
    assert reason_of(corpus, 5) == ("toy/train/00001.tar#1", "missing shard")
    os.truncate(folder / "00000.tar", 700)
    assert reason_of(corpus, 0) == ("toy/train/00000.tar#0", "truncated shard")
    assert reason_of(corpus, 3) == ("toy/train/00000.tar#3", "truncated shard")


def test_split_that_does_not_match_its_manifest_is_refused_at_once(tmp_path):
    """Invariant 6."""
    folder = write_split(tmp_path / "train", records(8))
    os.truncate(folder / "00001.tar", 700)
    with pytest.raises(ManifestError, match="truncated or changed"):
        Corpus(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(ManifestError, match="half-written"):
        Corpus(folder)


@pytest.mark.parametrize("damage", ["shape", "header", "source", "short", "pipe", "missing"])
def test_a_damaged_index_costs_its_shard_only(tmp_path, damage, clock):
    """Invariant 8."""
    folder = write_split(tmp_path / "train", records(8))
    corpus, index = Corpus(folder), folder / "00001.index.npy"
    if damage == "shape":
        np.save(index, np.zeros((2, 2), dtype=np.int64))
    elif damage == "header":
        index.write_bytes(b"\0" * index.stat().st_size)
    elif damage == "source":  # numpy parses the header as Python
        index.write_bytes(index.read_bytes().replace(b"}", b"{"))
    elif damage == "short":
        os.truncate(index, index.stat().st_size - 8)
    else:
        index.unlink()
        if damage == "pipe":
            os.mkfifo(index)
    reason = {"pipe": "unreadable shard", "missing": "missing shard"}.get(damage, "unreadable index")
    assert corpus.read(0).key == "k0000"
    assert reason_of(corpus, 6) == ("toy/train/00001.tar#2", reason)
    assert corpus.read(3).key == "k0003"


def test_an_index_cut_short_while_it_is_open_kills_nobody(tmp_path):
    folder = write_split(tmp_path / "train", records(8))
    corpus = Corpus(folder)
    assert corpus.read(4).key == "k0004"
    os.truncate(folder / "00001.index.npy", 200)
    assert reason_of(corpus, 7) == ("toy/train/00001.tar#3", "unreadable index")


class Clock:
    """Time that passes by sleeping only; ``due`` are (second, function) to be called then."""

    def __init__(self):
        self.now, self.due = 0.0, []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        for event in [event for event in self.due if event[0] <= self.now]:
            self.due.remove(event)
            event[1]()


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(shard_files, "time", found := Clock())
    return found


def test_a_pipe_in_place_of_a_shard_does_not_hang(tmp_path, clock):
    folder = write_split(tmp_path / "train", records(8))
    corpus = Corpus(folder)
    (folder / "00001.tar").unlink()
    os.mkfifo(folder / "00001.tar")
    assert reason_of(corpus, 4) == ("toy/train/00001.tar#0", "unreadable shard")
    assert clock.now == 0  # it will not become a file


def test_a_shard_that_comes_back_in_time_is_read(tmp_path, clock):
    folder = write_split(tmp_path / "train", records(8))
    corpus = Corpus(folder)
    (folder / "00001.tar").rename(folder / "aside")
    clock.due.append((1.5, partial((folder / "aside").rename, folder / "00001.tar")))
    assert corpus.read(4).key == "k0004" and not clock.due


def test_waiting_for_missing_shards_is_bounded_in_all(tmp_path, monkeypatch, clock):
    """A process waits for a while, not for a while per shard."""
    monkeypatch.setattr(shard_files, "PATIENCE_SECONDS", 5.0)
    folder = write_split(tmp_path / "train", records(40), samples_per_shard=2)
    corpus = Corpus(folder)
    for number in range(10):
        (folder / f"{number:05d}.tar").unlink()
    for index in range(20):
        assert reason_of(corpus, index)[1] == "missing shard"
    assert 5 <= clock.now <= 5 + 20 * 0.05  # one look at each of the others, with the shortest pause
    assert corpus.read(20).key == "k0020"


def test_a_folder_that_goes_away_is_an_error_that_says_so(tmp_path, clock):
    """What is open stays readable; the first shard that is not yet open ends the run, whatever the budget."""
    folder = write_split(tmp_path / "train", records(12))
    corpus = Corpus(folder)
    assert corpus.read(0).key == "k0000"
    folder.rename(tmp_path / "elsewhere")
    assert corpus.read(3).key == "k0003"
    with pytest.raises(LostCorpus, match="train is gone: renamed, deleted or no longer mounted; bring it back"):
        corpus.read(4)
    assert 8 <= clock.now <= 2 + 8 + 2 * 0.5  # seconds for the shard, then for the folder, and a pause after each
    (tmp_path / "elsewhere").rename(folder)
    assert corpus.read(4).key == "k0004"


def test_a_disk_of_which_nothing_can_be_read_is_lost(tmp_path, monkeypatch, clock):
    folder = write_split(tmp_path / "train", records(12), samples_per_shard=4)
    corpus = Corpus(folder)
    assert corpus.read(11).key == "k0011"
    pread, refused = os.pread, []

    def failing(descriptor, size, offset):
        refused.append(offset)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", failing)
    assert reason_of(corpus, 0)[1] == "unreadable shard" and reason_of(corpus, 4)[1] == "unreadable shard"
    with pytest.raises(LostCorpus, match="3 shards in a row cannot be read .*unreadable shard"):
        corpus.read(8)
    monkeypatch.setattr(os, "pread", pread)
    assert corpus.read(8).key == "k0008"


def test_a_stale_handle_is_mended_by_opening_again(tmp_path, monkeypatch):
    """A network file system that moved on answers old descriptors with ESTALE."""
    corpus = Corpus(write_split(tmp_path / "train", records(4)))
    assert corpus.read(0).key == "k0000"
    pread, stale = os.pread, [116]

    def once_stale(descriptor, size, offset):
        if stale:
            raise OSError(stale.pop(), "Stale file handle")
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", once_stale)
    assert corpus.read(1).key == "k0001" and not stale


def test_members_of_different_samples_do_not_mix(tmp_path):
    """An index entry that leads to a sound member of another sample, or of another kind, is noticed."""
    image = jpeg(0)
    twins = {"image": ("b.jpg", image), "meta": ("b.json", meta({"captions": ["of b"]})[1])}
    samples = [
        {"image": ("b.jpg", image), "meta": meta({"captions": ["of a"]})},
        {"image": ("a.json", image), "meta": meta({"captions": ["of a"]})},
        {"image": ("a.jpg", image), "meta": ("a.txt", meta({"captions": ["of a"]})[1])},
        twins,
    ]
    corpus = Corpus(write_raw_split(tmp_path / "train", samples))
    assert [reason_of(corpus, index)[1] for index in range(3)] == ["wrong member"] * 3
    assert corpus.read(3).text == "of b"
