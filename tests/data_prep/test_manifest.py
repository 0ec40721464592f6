"""The border: a manifest is complete and true, or it is refused with one line that says what to do."""

import errno
import json
import os
from dataclasses import replace

import numpy as np
import pytest

from data_prep.manifest import (
    Manifest,
    ManifestError,
    Shard,
    find_manifests,
    find_splits,
    first_bad_file,
    index_columns,
    is_prepared,
    load_manifest,
    open_index,
    read_manifest,
    write_manifest,
)
from data_prep.shard_members import row_text

FIELDS = ("image", "text", "meta")


def make_split(folder, corpus="c", split="train", fields=FIELDS):
    folder.mkdir(parents=True)
    (folder / "00000.tar").write_bytes(b"x" * 1024)
    np.save(folder / "00000.index.npy", np.zeros((3, 2 * len(fields) + 1), np.int64))
    shard = Shard("00000.tar", "00000.index.npy", 3, 2, 1024, "a" * 64, "b" * 64)
    manifest = Manifest(corpus, split, fields, (shard,), {"http_404": 2}, {"source": "test"})
    write_manifest(folder, manifest)
    return manifest


def edit(folder, **changes):
    content = json.loads((folder / "manifest.json").read_text())
    content.update(changes)
    (folder / "manifest.json").write_text(json.dumps(content))


def test_round_trip_keeps_everything_and_leaves_no_other_file(tmp_path):
    manifest = make_split(tmp_path / "train")
    assert read_manifest(tmp_path / "train") == manifest
    assert (manifest.rows, manifest.samples, manifest.num_images) == (3, 2, 1)
    assert sorted(p.name for p in (tmp_path / "train").iterdir()) == ["00000.index.npy", "00000.tar", "manifest.json"]


def test_fingerprint_depends_on_what_determines_samples_only(tmp_path):
    manifest = make_split(tmp_path / "train")
    same = replace(manifest, provenance={"source": "elsewhere"}, rejected={})
    assert same.fingerprint() == manifest.fingerprint() == read_manifest(tmp_path / "train").fingerprint()
    shard = manifest.shards[0]
    for other in (
        replace(manifest, corpus="d"),
        replace(manifest, split="dev"),
        replace(manifest, shards=(replace(shard, sha256="c" * 64),)),
        replace(manifest, shards=(replace(shard, index_sha256="c" * 64),)),
        replace(manifest, shards=(shard, shard)),
    ):
        assert other.fingerprint() != manifest.fingerprint()


def test_half_written_altered_and_foreign_splits_are_refused(tmp_path):
    """Invariant 6: a manifest is complete and verified, or it is not there."""
    folder = tmp_path / "train"
    make_split(folder)

    def message():
        with pytest.raises(ManifestError) as caught:
            read_manifest(folder)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    original = (folder / "manifest.json").read_text()
    (folder / "manifest.json").unlink()
    assert "half-written" in message() and "python -m data_prep" in message()
    (folder / "manifest.json").write_text(original[:100])
    assert "JSON" in message()
    (folder / "manifest.json").write_text("[1]")
    assert "list" in message()
    for changes, expected in (
        ({"format_version": 2}, "version 2"),
        ({"rows": 99}, "add up"),
        ({"shards": [{}]}, "file"),
        ({"shards": None}, "manifest.json"),
        ({"fields": ["image", "sound"]}, "sound"),
        ({"fields": ["image", "image2", "text", "meta"]}, "image2"),
        ({"corpus": 3}, "strings"),
    ):
        (folder / "manifest.json").write_text(original)
        edit(folder, **changes)
        assert expected in message()
    (folder / "manifest.json").write_text(original)
    (folder / "00000.tar").write_bytes(b"x" * 1000)
    assert "1000 bytes" in message() and "truncated" in message()
    (folder / "00000.tar").unlink()
    assert "missing" in message()


@pytest.mark.parametrize("name", ["../00000.tar", "/etc/passwd", "..", "", "a\\b", 7])
def test_a_path_out_of_the_folder_is_refused(tmp_path, name):
    """Invariant 7: no path out of the folder."""
    manifest = make_split(tmp_path / "train")
    shard = {**manifest.shards[0].__dict__, "file": name}
    edit(tmp_path / "train", shards=[shard])
    with pytest.raises(ManifestError, match="not a plain file name"):
        read_manifest(tmp_path / "train")


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    """Invariant 7: no path out of the folder."""
    make_split(tmp_path / "train")
    tar = tmp_path / "train" / "00000.tar"
    tar.rename(tmp_path / "elsewhere.tar")
    tar.symlink_to(tmp_path / "elsewhere.tar")
    with pytest.raises(ManifestError, match="link out of the split"):
        read_manifest(tmp_path / "train")


def test_find_splits_in_split_corpus_and_root(tmp_path):
    for corpus in ("b", "a"):
        make_split(tmp_path / corpus / "train", corpus)
    make_split(tmp_path / "a" / "dev", "a", "dev")
    assert find_splits(tmp_path, "train") == [tmp_path / "a" / "train", tmp_path / "b" / "train"]
    assert find_splits(tmp_path, "dev") == [tmp_path / "a" / "dev"]
    assert find_splits(tmp_path / "a", "dev") == [tmp_path / "a" / "dev"]
    assert find_splits(tmp_path / "a" / "dev", "dev") == [tmp_path / "a" / "dev"]
    with pytest.raises(ManifestError, match="holds split 'dev'"):
        find_splits(tmp_path / "a" / "dev", "train")


def test_find_splits_passes_over_image_pairs_unless_asked_for_them(tmp_path):
    make_split(tmp_path / "a" / "train", "a")
    make_split(tmp_path / "pairs" / "train", "pairs", fields=("image", "image1", "text", "meta"))
    assert find_splits(tmp_path, "train") == [tmp_path / "a" / "train"]
    assert find_splits(tmp_path, "train", num_images=2) == [tmp_path / "pairs" / "train"]
    with pytest.raises(ManifestError, match="2 image.*expected 1"):
        find_splits(tmp_path / "pairs", "train")


def test_nothing_prepared_and_half_written_are_told_apart(tmp_path):
    with pytest.raises(ManifestError, match="no such folder.*data_prep synth"):
        find_splits(tmp_path / "nowhere", "train")
    with pytest.raises(ManifestError, match="nothing prepared.*data_prep synth"):
        find_splits(tmp_path, "train")
    make_split(tmp_path / "a" / "train")
    (tmp_path / "b" / "train").mkdir(parents=True)
    (tmp_path / "b" / "train" / "00000.tar").write_bytes(b"")
    with pytest.raises(ManifestError, match="shards of another program.*or a split whose preparation was cut off"):
        find_splits(tmp_path, "train")
    with pytest.raises(ManifestError, match="shards of another program.*or a split whose preparation was cut off"):
        find_splits(tmp_path / "b" / "train", "train")
    (tmp_path / "b").rename(tmp_path / ".b")
    assert find_splits(tmp_path, "train") == [tmp_path / "a" / "train"]


def test_without_the_split_it_says_what_is_there(tmp_path):
    make_split(tmp_path / "a" / "dev", "a", split="dev")
    for folder in (tmp_path, tmp_path / "a"):
        with pytest.raises(ManifestError, match=r"no split 'train' here \(prepared: dev\)"):
            find_splits(folder, "train")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(ManifestError, match=r"a tokenizer, which --data\.tokenizer takes"):
        find_splits(tmp_path / "tokenizer", "train")


@pytest.fixture
def listed(monkeypatch):
    """Names of the folders that are listed from now on."""
    names = []
    for function in ("scandir", "listdir"):
        original = getattr(os, function)

        def noted(path=".", original=original):
            names.append(os.path.basename(path))
            return original(path)

        monkeypatch.setattr(os, function, noted)
    return names


def test_a_finished_split_is_found_without_listing_its_files(tmp_path, listed):
    """A folder of a hundred thousand tars takes minutes to list on a network file system."""
    for split in ("train", "dev"):
        make_split(tmp_path / "c" / split, split=split)
    for path in (tmp_path, tmp_path / "c", tmp_path / "c" / "train"):
        assert find_splits(path, "train") == [tmp_path / "c" / "train"]
    assert {"train", "dev"}.isdisjoint(listed)


def test_a_manifest_is_read_once(tmp_path, monkeypatch):
    make_split(tmp_path / "a" / "train", "a")
    make_split(tmp_path / "pairs" / "train", "pairs", fields=("image", "image1", "text", "meta"))
    parsed = []
    parse = json.loads
    monkeypatch.setattr(json, "loads", lambda content: parsed.append(content) or parse(content))
    ((folder, manifest),) = find_manifests(tmp_path, "train")
    assert (folder, manifest) == (tmp_path / "a" / "train", load_manifest(folder)) and len(parsed) == 3


def test_a_pipe_in_place_of_a_manifest_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(ManifestError, match="no manifest.json: half-written"):
        load_manifest(tmp_path)


def test_whether_something_is_prepared_is_known_without_reading_it(tmp_path, listed, monkeypatch):
    assert not is_prepared(tmp_path / "nowhere", "train") and not is_prepared(tmp_path, "train")
    make_split(tmp_path / "c" / "train")
    monkeypatch.setattr("data_prep.manifest.load_manifest", None)
    for path in (tmp_path, tmp_path / "c", tmp_path / "c" / "train"):
        assert is_prepared(path, "train")
    assert not is_prepared(tmp_path, "dev") and not is_prepared(tmp_path / "c", "dev")
    (tmp_path / "c" / "train" / "manifest.json").unlink()
    assert not is_prepared(tmp_path / "c", "train")
    assert "train" not in listed[:-1]


@pytest.mark.parametrize("at_a_time", [1, 2, 1000])
def test_files_are_checked_in_shares_and_the_first_is_named(tmp_path, monkeypatch, at_a_time):
    """However many are looked at together."""
    monkeypatch.setattr("data_prep.manifest._CHECKED_AT_A_TIME", at_a_time)
    one = make_split(tmp_path / "train").shards[0]
    shards = [replace(one, file=f"{n}.tar", index_file=f"{n}.npy") for n in range(8)]
    for shard in shards:
        (tmp_path / "train" / shard.file).write_bytes(b"x" * shard.bytes)
        (tmp_path / "train" / shard.index_file).write_bytes(b"")
    table = Manifest("c", "train", FIELDS, shards).shards
    for name in ("3.npy", "6.tar"):
        (tmp_path / "train" / name).unlink()
    found = [first_bad_file(tmp_path / "train", table, range(rank, 8, 3)) for rank in range(3)]
    assert [bad and bad[0] for bad in found] == [3, None, None]  # 6 is of the same share
    assert "3.npy: named by the manifest but missing" in found[0][1]
    assert first_bad_file(tmp_path / "train", table, range(4, 8))[0] == 6
    assert first_bad_file(tmp_path / "train", table, range(8))[0] == 3


def test_a_file_that_may_not_be_looked_at_is_not_called_missing(tmp_path, monkeypatch):
    make_split(tmp_path / "train")

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "lstat", refuse)
    with pytest.raises(ManifestError, match=r"00000\.tar: cannot be read \(Permission denied\)$"):
        read_manifest(tmp_path / "train")


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.EACCES])
def test_a_manifest_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch, number):
    make_split(tmp_path / "train")

    def refuse(self):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(ManifestError, match=f"cannot be read .{os.strerror(number)}.$"):
        load_manifest(tmp_path / "train")


def test_index_layout_and_shape_check(tmp_path):
    manifest = make_split(tmp_path / "train")
    columns = index_columns(FIELDS)
    assert columns.offset == {"image": 0, "text": 2, "meta": 4}
    assert columns.size == {"image": 1, "text": 3, "meta": 5}
    assert (columns.caption, columns.width) == (6, 7)
    assert isinstance(open_index(tmp_path / "train", manifest, manifest.shards[0]), np.memmap)
    for content in (np.zeros((2, 7), np.int64), np.zeros((3, 7), np.int32)):
        np.save(tmp_path / "train" / "00000.index.npy", content)
        with pytest.raises(ManifestError, match="expected int64"):
            open_index(tmp_path / "train", manifest, manifest.shards[0])
    np.save(tmp_path / "train" / "00000.index.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ManifestError, match="not a readable index"):
        open_index(tmp_path / "train", manifest, manifest.shards[0])


BROKEN_HEADERS = (b"{'descr': '<i8', 'shape': (3, 7", b"  {\n x", b"'" * 60, b"(" * 60, b"{'a': 9" + b"9" * 30)


@pytest.mark.parametrize("text", BROKEN_HEADERS)
def test_a_damaged_header_of_an_index_is_a_broken_index(tmp_path, text):
    """Invariant 7: also where numpy, which reads the header as Python source, raises what a parser raises."""
    manifest = make_split(tmp_path / "train")
    index = tmp_path / "train" / "00000.index.npy"
    content = index.read_bytes()
    index.write_bytes(content[:10] + text.ljust(118) + content[128:])
    for damaged in (index.read_bytes(), b""):
        index.write_bytes(damaged)
        with pytest.raises(ManifestError, match="not a readable index"):
            open_index(tmp_path / "train", manifest, manifest.shards[0])


@pytest.mark.parametrize("shape", [(10**12, 7), (2**62, 2**62), (-1, 7)])
def test_an_index_that_claims_more_rows_than_it_has_is_refused(tmp_path, shape):
    """Invariant 7: no memory is taken for a number that a file names."""
    make_split(tmp_path / "train")
    index = tmp_path / "train" / "00000.index.npy"
    header = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}, }}".encode()
    index.write_bytes(index.read_bytes()[:10] + header.ljust(118))
    for rows in (3, 0):  # a shard without rows is read, not mapped
        edit(tmp_path / "train", rows=rows, shards=[shard_of(tmp_path / "train") | {"rows": rows}])
        manifest = read_manifest(tmp_path / "train")
        with pytest.raises(ManifestError, match="not a readable index|expected int64"):
            open_index(tmp_path / "train", manifest, manifest.shards[0])


def shard_of(folder):
    return json.loads((folder / "manifest.json").read_text())["shards"][0]


def test_an_index_with_objects_is_not_unpickled(tmp_path):
    """Invariant 7."""
    manifest = make_split(tmp_path / "train")
    np.save(tmp_path / "train" / "00000.index.npy", np.array([{}, print], dtype=object), allow_pickle=True)
    with pytest.raises(ManifestError, match=r"not a readable index .*\|O"):
        open_index(tmp_path / "train", manifest, manifest.shards[0])


def test_deep_json_and_pipes_are_no_manifests(tmp_path):
    """Invariant 7."""
    make_split(tmp_path / "train")
    for text in ("[" * 100_000, '{"a":' * 100_000, '{"format_version": 1e999}', '{"rows": ' + "9" * 5000 + "}"):
        (tmp_path / "train" / "manifest.json").write_text(text)
        with pytest.raises(ManifestError):
            read_manifest(tmp_path / "train")
    (tmp_path / "train" / "manifest.json").unlink()
    os.mkfifo(tmp_path / "train" / "manifest.json")
    with pytest.raises(ManifestError, match="no manifest.json"):
        read_manifest(tmp_path / "train")


def test_captions_rule():
    assert row_text("t", None, 0) == row_text("t", {}, 3) == "t"
    assert row_text("t", {"captions": ["a", "b"]}, 1) == "b"
    for arguments in (
        (None, {}, 0),
        ("t", {"captions": ["a"]}, 1),
        ("t", {"captions": [1]}, 0),
        ("t", {"captions": 5}, 0),
    ):
        with pytest.raises(ValueError):
            row_text(*arguments)


def test_links_as_the_hub_keeps_them_are_followed_and_others_not(tmp_path):
    """Invariant 7."""
    split = tmp_path / "datasets--me--mine" / "snapshots" / "abc" / "train"
    make_split(split)
    for place in (tmp_path / "datasets--me--mine" / "blobs", tmp_path / "blobs", tmp_path / "elsewhere"):
        place.mkdir()
        for file in [*split.glob("*.tar"), *split.glob("*.npy")]:
            target = place / file.name
            target.write_bytes(file.read_bytes())
            file.unlink()
            file.symlink_to(os.path.relpath(target, file.parent))
        if place.parent == tmp_path:
            with pytest.raises(ManifestError, match="a link out of the split"):
                read_manifest(split)
        else:
            assert read_manifest(split).rows
