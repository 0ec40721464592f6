"""Passports: counts at each stage add up, parts merge to the whole, equal runs give equal bytes, old manifests read."""

import io
import json
import random
from collections import Counter

import pytest
from PIL import Image

from data_prep.checks.info import describe_split, format_table
from data_prep.checks.measure import measure_split
from data_prep.manifest import load_manifest, read_manifest, write_manifest
from data_prep.passport import HISTOGRAMS, Statistics, host_of, picture_size, source_files, stage_of
from data_prep.record import Record, Rejection
from tests.data_prep.checks.splits import jpeg, write_split


def image(kind, size):
    stream = io.BytesIO()
    Image.new("RGB", size).save(stream, kind)
    return stream.getvalue()


def mixed(number=40, seed=0):
    """Records and rejections of several hosts, sizes and formats."""
    chance = random.Random(seed)
    items = []
    for i in range(number):
        kind = chance.choice(["JPEG", "PNG", "WEBP"])
        size = (chance.randint(16, 90), chance.randint(16, 90))
        captions = tuple(" ".join(["word"] * chance.randint(1, 60)) for _ in range(chance.randint(1, 3)))
        items.append(Record(f"k{i}", (image(kind, size),), captions, {"url": f"http://h{i % 30}.org/{i}"}))
        if i % 3 == 0:
            items.append(Rejection("timeout", f"row {i}: https://H{i % 7}.org:8080/{i}", rows=2))
    return [*items, Rejection("bad_url", "row 99: x"), Record("tiny", (jpeg(0, (4, 4)),), ("a", "b"))]


def passport_of(split_dir):
    return read_manifest(split_dir).provenance["passport"]


def test_counts_of_every_stage_add_up(tmp_path):
    items = mixed()
    manifest = write_split(tmp_path / "c" / "train", items)
    passport = passport_of(tmp_path / "c" / "train")
    rows = passport["rows"]
    offered = sum(len(item.captions) if isinstance(item, Record) else item.rows for item in items)
    assert rows["read"] == offered == manifest.rows + sum(manifest.rejected.values())
    assert rows["rejected_by_source"] == 1 and rows["rejected_by_download"] == 28 and rows["rejected_by_filters"] == 2
    assert rows["written"] == manifest.rows and passport["samples"] == manifest.samples
    assert {reason: one["rows"] for reason, one in passport["rejected"].items()} == manifest.rejected
    assert passport["rejected"]["image_too_small"] == {"rows": 2, "example": "tiny"}
    assert len(passport["hosts"]) == 20 and passport["other_hosts"]["hosts"] == 10
    written = sum(host["written"] for host in [*passport["hosts"].values(), passport["other_hosts"]])
    assert written == manifest.rows, "every row came from a host"
    assert passport["hosts"]["h0.org"]["rejected"] == {"timeout": 4}, "hosts in small letters, ports left out"


def test_histograms_count_what_pillow_sees(tmp_path):
    items = [item for item in mixed() if isinstance(item, Record)]
    write_split(tmp_path / "c" / "train", items)
    passport, sides, words = passport_of(tmp_path / "c" / "train"), Counter(), Counter()
    for item in items[:-1]:
        with Image.open(io.BytesIO(item.images[0])) as opened:
            side = min(opened.size)
        sides[f"{max(edge for edge in HISTOGRAMS['shorter_side'] if edge <= side):g}"] += 1
        for caption in item.captions:
            words[f"{max(edge for edge in HISTOGRAMS['caption_words'] if edge <= len(caption.split())):g}"] += 1
    assert passport["shorter_side"]["bins"] == sides and passport["caption_words"]["bins"] == words
    assert passport["image_bytes"]["sum"] == sum(len(item.images[0]) for item in items[:-1])
    assert passport["formats"].keys() == {"jpg", "png", "webp"}


def test_what_the_files_hold_is_what_was_counted_in_writing(tmp_path):
    manifest = write_split(tmp_path / "c" / "train", mixed())
    measured = measure_split(tmp_path / "c" / "train", manifest, 1)
    assert measured.as_json() == passport_of(tmp_path / "c" / "train")


def test_parts_merge_to_the_whole():
    whole, parts = Statistics(), [Statistics() for _ in range(3)]
    for number, item in enumerate(mixed()):
        for statistics in (whole, parts[number * 3 // 100]):
            if isinstance(item, Record):
                extensions = ({b"\xff\xd8": "jpg", b"\x89P": "png"}.get(item.images[0][:2], "webp"),)
                statistics.add(Record(item.key, item.images, item.captions, item.meta, extensions))
            else:
                statistics.reject(item)
    merged = Statistics()
    for part in parts:
        merged.merge(Statistics.from_json(json.loads(json.dumps(part.as_json(top_hosts=None)))))
    assert merged.as_json() == whole.as_json() and merged.as_json(None) == whole.as_json(None)
    assert merged.as_json()["other_hosts"]["hosts"] > 0


def test_equal_runs_give_equal_bytes_and_no_passport_changes_the_fingerprint(tmp_path):
    for name in ("a", "b"):
        write_split(tmp_path / name / "c" / "train", mixed())
    texts = [(tmp_path / name / "c" / "train" / "manifest.json").read_bytes() for name in ("a", "b")]
    assert texts[0] == texts[1]
    manifest = load_manifest(tmp_path / "a" / "c" / "train")
    fingerprint = manifest.fingerprint()
    del manifest.provenance["passport"]
    write_manifest(tmp_path / "a" / "c" / "train", manifest)
    older = read_manifest(tmp_path / "a" / "c" / "train")
    assert older.fingerprint() == fingerprint
    assert "c/train" in format_table([describe_split(tmp_path / "a" / "c" / "train")])


def test_info_says_in_a_line_where_the_rows_went(tmp_path):
    write_split(tmp_path / "c" / "train")
    described = describe_split(tmp_path / "c" / "train")
    text = format_table([described])
    assert "rows of c/train: 14 read, 1 rejected by source, 1 by download, 0 by filters, 12 written" in text
    assert "hosts of c/train: host1.org 6 of 7, host0.org 6 of 6" in text
    assert json.loads(json.dumps(described))["provenance"]["passport"]["rows"]["read"] == 14


@pytest.mark.parametrize(
    ("reason", "name", "stage"),
    [
        ("http_404", "row 7: http://x.org/a", "download"),
        ("image_bytes_too_large", "row 7: http://x.org/a", "download"),
        ("image_bytes_too_large", "000000007", "filters"),
        ("empty_caption", "row 7: http://x.org/a", "source"),
        ("empty_caption", "000000007", "filters"),
        ("missing_image", "1000268201_693b08cb0e.jpg", "source"),
        ("malformed_row", "", "source"),
        ("lost_by_downloader", "row 7: x", "download"),
    ],
)
def test_stages(reason, name, stage):
    assert stage_of(Rejection(reason, name)) == stage


def test_hosts_of_hostile_addresses():
    assert [host_of(url) for url in ("http://A.org:80/x", "http://u:p@b.org", "http://[::1", "x", "")] == [
        "a.org",
        "b.org",
        "",
        "",
        "",
    ]


def test_source_files_are_named_with_size_and_hash(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.tsv").write_text(folder)
    files = source_files([tmp_path / "a" / "rows.tsv", tmp_path / "b" / "rows.tsv"])
    assert files["rows.tsv"]["bytes"] == 1 and files.keys() == {"rows.tsv", "b/rows.tsv"}
    assert files["rows.tsv"]["sha256"].startswith("ca978112ca1bbdca"), "SHA-256 of the letter a (FIPS 180-2)"


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"exif": b"Exif\0\0" + bytes(500)}, {"icc_profile": b"x" * 70_000}]
)
def test_sizes_by_headers_are_those_of_pillow(options):
    for size in ((1, 1), (300, 17), (17, 4000)):
        stream = io.BytesIO()
        Image.new("RGB", size).save(stream, "JPEG", **options)
        assert picture_size(stream.getvalue()) == size
        assert picture_size(image("PNG", size)) == picture_size(image("WEBP", size)) == size


def test_sizes_of_damaged_headers():
    whole = jpeg(0, (30, 20))
    found = {picture_size(whole[:cut]) for cut in range(len(whole))}
    assert found == {None, (30, 20)}
    assert picture_size(b"\xff\xd8" + b"\xff\xe0\0\2" * 100_000) is None and picture_size(b"") is None
