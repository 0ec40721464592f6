"""Clips in shards: bytes as they came, one sample with all captions, refused among images and images among them."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from data_prep.checks.info import describe_split
from data_prep.checks.verify import Limits, verify_split
from data_prep.filters import DuplicateFilter, check_record
from data_prep.manifest import Manifest, ManifestError, find_manifests, find_splits, read_manifest, write_manifest
from data_prep.prepare import fill_split
from data_prep.record import PrepError, Record
from data_prep.shard_writer import SplitWriter
from data_prep.video.decoding import ClipLimits
from pipeline.data.shard_reader import Corpus
from tests.numbered_clips import HEIGHT, WIDTH, clip
from tests.pipeline.data.test_reader import records, write_split


def clip_record(key: str, video: bytes, captions: tuple[str, ...] = ("one", "two")) -> Record:
    return Record(key, (), captions, {"source": key}, video=video)


def write_clips(split_dir: Path, found: list[Record], corpus: str = "clips") -> Manifest:
    writer = SplitWriter(split_dir, corpus, split_dir.name, samples_per_shard=2, videos=True)
    return fill_split(writer, found, ClipLimits(), workers=1)


@pytest.fixture
def split(tmp_path: Path) -> Path:
    found = [clip_record(f"k{n}", clip(4 + n, one)) for n, one in enumerate(("mp4", "webm", "avi"))]
    write_clips(tmp_path / "clips" / "train", found)
    return tmp_path / "clips" / "train"


def test_a_clip_is_one_sample_with_its_bytes_as_they_came(split: Path) -> None:
    manifest = read_manifest(split)
    assert manifest.is_video and manifest.fields == ("video", "text", "meta")
    assert (manifest.rows, manifest.samples, len(manifest.shards)) == (6, 3, 2)
    with tarfile.open(split / "00000.tar") as tar:
        names = tar.getnames()
        assert names == ["k0.mp4", "k0.txt", "k0.json", "k1.webm", "k1.txt", "k1.json"]
        assert tar.extractfile("k0.mp4").read() == clip(4, "mp4")
    corpus = Corpus(split)
    samples = [corpus.read(index) for index in range(6)]
    assert [one.text for one in samples] == ["one", "two"] * 3
    assert [one.video for one in samples[::2]] == [clip(4 + n, one) for n, one in enumerate(("mp4", "webm", "avi"))]
    assert all(one.images == [] for one in samples) and [one.num_frames for one in samples] == [4, 4, 5, 5, 6, 6]
    assert samples[0].meta["frame_size"] == [WIDTH, HEIGHT] and samples[0].meta["seconds"] == 0.4
    assert corpus.read_without_images(0).video is None
    assert verify_split(split, Limits(), 1).problems == []
    assert describe_split(split)["image_pixels"] == {f"{WIDTH}x{HEIGHT}": 2}, "those of the first shard"


def test_verifying_decodes_clips(tmp_path: Path) -> None:
    with SplitWriter(tmp_path / "clips" / "train", "clips", "train", videos=True) as writer:
        writer.add(Record("k", (), ("one",), {}, ("mp4",), video=clip(4)[:500]))
    (problem,) = verify_split(tmp_path / "clips" / "train", Limits(), 1).problems
    assert "video: " in problem


def test_what_is_rejected_is_counted_by_reason(tmp_path: Path) -> None:
    found = [
        clip_record("good", clip(4)),
        clip_record("page", b"<html>gone</html>"),
        clip_record("sound", clip(0, sound_seconds=0.5)),
        clip_record("cut", clip(4)[:600]),
        clip_record("empty", b"", ("one",)),
        clip_record("good", clip(5)),
    ]
    manifest = write_clips(tmp_path / "clips" / "train", found)
    assert manifest.rejected == {
        "duplicate_key": 2,
        "empty_video": 1,
        "no_video_stream": 2,
        "not_a_video": 2,
        "undecodable_video": 2,
    }
    assert manifest.samples == 1


def test_an_equal_clip_with_an_equal_caption_is_a_duplicate() -> None:
    drop = DuplicateFilter(drop_pairs=True)
    kept, _ = check_record(clip_record("a", clip(4)), ClipLimits())
    again, other = clip_record("b", clip(4), ("two", "three")), clip_record("c", clip(5), ("two",))
    assert drop(kept)[1] == [] and [one.reason for one in drop(again)[1]] == ["duplicate_pair"]
    assert drop(other)[1] == []


def test_images_and_clips_do_not_share_a_split(tmp_path: Path) -> None:
    (image,) = records(1)
    with pytest.raises(PrepError, match=r"1 image\(s\), expected a clip as in the rest of the split"):
        with SplitWriter(tmp_path / "a" / "train", "a", "train", videos=True) as writer:
            writer.add(image)
    with pytest.raises(PrepError, match="has a clip, expected 1 as in the rest of the split"):
        with SplitWriter(tmp_path / "a" / "train", "a", "train") as writer:
            writer.add(Record("k", (), ("one",), {}, ("mp4",), video=clip(2)))
    assert not (tmp_path / "a" / "train").exists()


def test_each_kind_is_found_by_those_who_want_it(split: Path, tmp_path: Path) -> None:
    images = write_split(tmp_path / "images" / "train", records(4))
    assert find_splits(tmp_path, "train") == [images]
    assert find_splits(tmp_path, "train", videos=True) == [split]
    assert find_splits(tmp_path, "train", num_images=None) == [split, images]
    with pytest.raises(ManifestError, match=r"holds split 'train' with a clip per sample.*--data.frames N"):
        find_splits(split, "train")
    with pytest.raises(
        ManifestError, match=r"1 image\(s\) per sample, expected .* a clip; images .* --data.frames null"
    ):
        find_splits(images, "train", videos=True)
    with pytest.raises(ManifestError, match=r"\(a clip per sample, expected 1 image\(s\)\).*--data.frames N"):
        find_splits(split.parent, "train")


def test_a_manifest_names_a_clip_or_images(split: Path, tmp_path: Path) -> None:
    manifest = read_manifest(split)
    mixed = Manifest(manifest.corpus, manifest.split, ("video", "image", "text", "meta"), manifest.shards)
    write_manifest(split, mixed)
    with pytest.raises(ManifestError, match="expected distinct names of"):
        read_manifest(split)


@pytest.mark.parametrize(("videos", "verb"), [(True, "moving"), (False, "synth")])
def test_data_that_is_not_there_names_what_makes_it(tmp_path: Path, videos: bool, verb: str) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ManifestError, match=f"run `python -m data_prep {verb}` or name"):
            find_manifests(folder, "train", videos=videos)
