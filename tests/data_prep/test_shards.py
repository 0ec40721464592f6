"""Shards: deterministic bytes, readable by webdataset and by pread, complete or absent; verify notices damage."""

import hashlib
import io
import json
import os
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_prep.checks.info import all_splits, describe_split, format_table, row_texts
from data_prep.checks.verify import verify_split
from data_prep.filters import Limits
from data_prep.manifest import ManifestError, index_columns, open_index, read_manifest
from data_prep.parallel import ordered_map
from data_prep.prepare import fill_split
from data_prep.record import LowYieldError, PrepError, Record, Rejection
from data_prep.shard_members import row_text
from data_prep.shard_writer import SplitWriter, tar_header


def jpeg(grey=0, size=(24, 24)):
    stream = io.BytesIO()
    Image.new("L", size, grey).save(stream, "JPEG")
    return stream.getvalue()


def records(number=5):
    return [Record(f"k{i}", (jpeg(10 * i),), (f"caption {i}", f"ein Größe {i}"), {"number": i}) for i in range(number)]


def write(folder, items, **options):
    writer = SplitWriter(folder, folder.parent.name, folder.name, **{"samples_per_shard": 2, **options})
    return fill_split(writer, items, Limits(), workers=1)


def digest(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_rows_are_read_back_by_offset_and_size(tmp_path):
    manifest = write(tmp_path / "c" / "train", records())
    assert (manifest.rows, manifest.samples, len(manifest.shards)) == (10, 5, 3)
    assert manifest == read_manifest(tmp_path / "c" / "train")
    columns = index_columns(manifest.fields)
    seen = []
    for shard in manifest.shards:
        index = open_index(tmp_path / "c" / "train", manifest, shard)
        descriptor = os.open(tmp_path / "c" / "train" / shard.file, os.O_RDONLY)
        for row in index.tolist():
            parts = {
                name: os.pread(descriptor, row[columns.size[name]], row[columns.offset[name]])
                for name in manifest.fields
            }
            meta = json.loads(parts["meta"])
            assert parts["image"] == jpeg(10 * meta["number"])
            assert parts["text"].decode() == f"caption {meta['number']}"
            seen.append(row_text(parts["text"].decode(), meta, row[columns.caption]))
        os.close(descriptor)
    assert seen == [caption for record in records() for caption in record.captions]
    assert seen == list(row_texts(tmp_path / "c" / "train", manifest))


def test_webdataset_reads_the_shards(tmp_path):
    manifest = write(tmp_path / "c" / "train", records())
    urls = [str(tmp_path / "c" / "train" / shard.file) for shard in manifest.shards]
    samples = list(
        webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("__key__", "jpg", "txt", "json")
    )
    assert [sample[0] for sample in samples] == [f"k{i}" for i in range(5)]
    assert samples[3][1].size == (24, 24) and samples[3][2] == "caption 3"
    assert samples[3][3] == {"number": 3, "captions": ["caption 3", "ein Größe 3"]}


def test_image_pairs(tmp_path):
    items = [Record("p", (jpeg(0), jpeg(200)), ("same",), {"label": "False"})]
    manifest = write(tmp_path / "c" / "train", items, num_images=2)
    assert manifest.fields == ("image", "image1", "text", "meta") and manifest.num_images == 2
    with tarfile.open(tmp_path / "c" / "train" / "00000.tar") as tar:
        assert tar.getnames() == ["p.0.jpg", "p.1.jpg", "p.txt", "p.json"]
    assert verify_split(tmp_path / "c" / "train", Limits(), 1).problems == []
    (sample,) = webdataset.WebDataset([str(tmp_path / "c" / "train" / "00000.tar")], shardshuffle=False)
    assert sample["1.jpg"] == jpeg(200)


def test_equal_records_give_equal_bytes(tmp_path):
    write(tmp_path / "a" / "c" / "train", records())
    write(tmp_path / "b" / "c" / "train", records())
    assert digest(tmp_path / "a" / "c" / "train") == digest(tmp_path / "b" / "c" / "train")


def test_every_row_is_written_or_counted_and_named(tmp_path):
    """Invariant 8: what cannot be used is counted by reason and named."""
    items = [*records(3), Record("k1", (jpeg(),), ("again", "twice")), Record("x", (b"",), ("a",))]
    items += [Record("y", (jpeg(),), ("", "fine")), Rejection("http_404", "row 7", "gone")]
    manifest = write(tmp_path / "c" / "train", items)
    assert manifest.rejected == {"duplicate_key": 2, "empty_caption": 1, "empty_image": 1, "http_404": 1}
    assert manifest.rows + sum(manifest.rejected.values()) == 6 + 2 + 1 + 2 + 1
    lines = [json.loads(line) for line in (tmp_path / "c" / "train" / "rejected.jsonl").read_text().splitlines()]
    assert ("http_404", "row 7") in [(line["reason"], line["name"]) for line in lines]


def test_workers_change_nothing(tmp_path):
    items = [*records(70), Record("bad", (b"x",), ("a",))]
    alone = write(tmp_path / "a" / "c" / "train", items)
    writer = SplitWriter(tmp_path / "b" / "c" / "train", "c", "train", samples_per_shard=2)
    assert fill_split(writer, items, Limits(), workers=2) == alone


def test_interruption_leaves_nothing_behind_and_the_old_split_in_place(tmp_path):
    """Invariant 6: complete, or not there."""

    def interrupted():
        yield from records(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "c" / "train", interrupted())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "c").mkdir()
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "c" / "train", interrupted())
    assert list((tmp_path / "c").iterdir()) == [], "a folder that was there stays"
    write(tmp_path / "c" / "train", records(2))
    before = digest(tmp_path / "c" / "train")
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "c" / "train", interrupted(), overwrite=True)
    assert digest(tmp_path / "c" / "train") == before
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["README.md", "train"]


def test_existing_splits_and_foreign_folders_are_not_replaced(tmp_path):
    write(tmp_path / "c" / "train", records(2))
    with pytest.raises(PrepError, match="--overwrite"):
        write(tmp_path / "c" / "train", records(3))
    assert write(tmp_path / "c" / "train", records(3), overwrite=True).samples == 3
    (tmp_path / "c" / "dev").mkdir()
    (tmp_path / "c" / "dev" / "thesis.txt").write_text("precious")
    with pytest.raises(PrepError, match="no finished split"):
        write(tmp_path / "c" / "dev", records(3), overwrite=True)


def test_nothing_usable_and_too_low_a_yield_write_nothing(tmp_path):
    with pytest.raises(PrepError, match="no usable record .*1 not_an_image"):
        write(tmp_path / "c" / "train", [Record("x", (b"x",), ("a",))])
    items = [*records(1), *(Rejection("http_404", str(i)) for i in range(8))]
    with pytest.raises(LowYieldError, match="20.0%.*8 http_404"):
        fill_split(SplitWriter(tmp_path / "c" / "train", "c", "train"), items, Limits(), 1, min_yield=0.5)
    assert list(tmp_path.iterdir()) == []


def test_verify_accepts_what_was_written_and_info_describes_it(tmp_path):
    write(tmp_path / "c" / "train", [*records(), Rejection("timeout", "row 9")])
    found = verify_split(tmp_path / "c" / "train", Limits(), 1)
    assert (found.problems, found.rows, found.samples, found.images) == ([], 10, 5, 5)
    (split,) = all_splits(tmp_path)
    described = describe_split(split)
    assert described["rows"] == 10 and described["image_pixels"] == {"24x24": 2}
    assert described["caption_words"] == {"min": 2, "median": 2.5, "mean": 2.5, "p99": 3, "max": 3}
    table = format_table([described])
    assert "c/train" in table and "1 timeout" in table


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)


def edit_index(folder, change):
    index = np.load(folder / "00000.index.npy")
    change(index)
    np.save(folder / "00000.index.npy", index)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda f: flip(f / "00000.tar", 700), "SHA-256"),
        (lambda f: flip(f / "00000.index.npy", 200), "SHA-256"),
        (lambda f: flip(f / "00000.tar", 3), "00000.tar"),
        (lambda f: (f / "00000.tar").write_bytes((f / "00000.tar").read_bytes()[:2000]), "truncated"),
        (lambda f: (f / "manifest.json").unlink(), "half-written"),
        (lambda f: (f / "00009.tar").write_bytes(b""), "not named by the manifest"),
        (lambda f: edit_index(f, lambda index: index.__setitem__((0, 1), 7)), "no member of the tar"),
        (lambda f: edit_index(f, lambda index: index.__setitem__((0, 6), 5)), "do not hold number 5"),
        (
            lambda f: edit_index(f, lambda index: index.__setitem__((0, slice(2, 4)), index[3, 2:4])),
            "mixes the samples",
        ),
    ],
)
def test_verify_notices_damage(tmp_path, damage, expected):
    """Invariant 6: complete and verified."""
    folder = tmp_path / "c" / "train"
    write(folder, records(4))
    damage(folder)
    problems = verify_split(folder, Limits(), 1).problems
    assert any(expected in problem for problem in problems), problems


def test_verify_notices_undecodable_images_and_hostile_members(tmp_path):
    """Invariant 7: no path out of the folder."""
    folder = tmp_path / "c" / "train"
    writer = SplitWriter(folder, "c", "train")
    with writer:
        writer.add(Record("../evil", (jpeg(),), ("a",), {}, ("jpg",)))
        writer.add(Record("bad", (b"no image",), ("a",), {}, ("jpg",)))
        writer.add(Record("twice", (jpeg(),), ("a",), {}, ("jpg",)))
        writer.add(Record("twice", (jpeg(),), ("a",), {}, ("jpg",)))
    text = "\n".join(verify_split(folder, Limits(), 1).problems)
    assert "not_an_image" in text and "unsafe name" in text and "'twice.jpg' occurs 2 times" in text


def die(item):
    os._exit(9)


@pytest.mark.slow
def test_a_dead_worker_is_an_error_and_not_a_hang():
    with pytest.raises(ChildProcessError, match="worker process died"):
        list(ordered_map(die, range(3), workers=2))


@pytest.mark.parametrize(("column", "value"), [(0, -5), (1, -1), (1, 2**40), (2, 2**62), (3, 2**40), (4, 512), (6, 9)])
def test_info_and_tokenizer_say_in_one_line_that_an_index_is_damaged(tmp_path, column, value):
    """Invariant 7: offsets and sizes of a file are no places to read from before they are checked."""
    split = tmp_path / "c" / "train"
    manifest = write(split, records())
    index = np.load(split / "00000.index.npy")
    index[0, column] = value
    np.save(split / "00000.index.npy", index)
    if column in (0, 1):  # of the image
        assert describe_split(split)["image_pixels"] == {"24x24": 2, "unreadable": 1}
        return
    for read in (lambda: describe_split(split), lambda: list(row_texts(split, manifest))):
        with pytest.raises(ManifestError, match="row 0 of its index has no caption") as error:
            read()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("wanted", "given"), [(1, 2), (2, 1), (2, 3)])
def test_a_record_with_another_number_of_images_is_named(tmp_path, wanted, given):
    items = [Record(f"k{n}", (jpeg(),) * count, ("x",)) for n, count in enumerate((wanted, given))]
    with pytest.raises(PrepError, match=rf"record k1 has {given} image\(s\), expected {wanted}"):
        write(tmp_path / "c" / "train", items, num_images=wanted)
    assert not (tmp_path / "c").exists()


def test_what_is_of_a_caption_stands_beside_the_captions(tmp_path):
    record = Record("k", (jpeg(),), ("a", "", "c"), {"file": "k.jpg"}, per_caption={"label": ["x", "y", "z"]})
    write(tmp_path / "c" / "train", [record])
    with tarfile.open(tmp_path / "c" / "train" / "00000.tar") as tar:
        meta = json.load(tar.extractfile("k.json"))
    assert meta == {"file": "k.jpg", "label": ["x", "z"], "captions": ["a", "c"]}


@pytest.mark.parametrize("name", ["a.jpg", "é" * 20 + ".txt", "x" * 100, "f/" + "y" * 100, "\udcff.json", ""])
@pytest.mark.parametrize("size", [0, 1, 511, 8**11 - 1])
def test_headers_are_those_of_tarfile(name, size):
    info = tarfile.TarInfo(name)
    info.size = size
    assert tar_header(name, size) == info.tobuf(tarfile.USTAR_FORMAT)


def test_what_a_header_cannot_hold_is_refused():
    for name, size in (("z" * 101, 1), ("a.jpg", 8**11)):
        with pytest.raises(ValueError):
            tar_header(name, size)
