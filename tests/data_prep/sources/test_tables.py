"""Every row of a table is read or counted: whatever its compression, encoding, nesting and damage."""

import bz2
import gzip
import json
import random
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_prep.filters import REASONS
from data_prep.manifest import read_manifest
from data_prep.record import PrepError, Rejection, UrlRow
from data_prep.sources.tables import read_table
from data_prep.sources.url_table import url_rows
from tests.data_prep.annotations.prepared import images as stored
from tests.data_prep.annotations.prepared import metas, picture, prepare

TSV = "url\tcaption\nhttp://h/0\ta dog\nhttp://h/1\tun caf\u00e9\n"


def rows_of(path, url="url", caption="caption", extra=(), json_columns=(), **options):
    return list(url_rows(path, url, caption, list(extra), list(json_columns), **options))


def captions(rows):
    return [row.captions if isinstance(row, UrlRow) else row.reason for row in rows]


def zstd_file(path, content):
    with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
        stream.write(content)


def test_compressed_tables_are_read_as_plain_ones(tmp_path):
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(TSV[:20].encode()) + gzip.compress(TSV[20:].encode()))
    (tmp_path / "a.tsv.bz2").write_bytes(bz2.compress(TSV.encode()))
    zstd_file(tmp_path / "a.tsv.zst", TSV.encode())
    zstd_file(tmp_path / "more", TSV.encode("utf-16"))
    (tmp_path / "b.TSV.zstd").write_bytes((tmp_path / "more").read_bytes())
    for name in ("a.tsv.gz", "a.tsv.bz2", "a.tsv.zst", "b.TSV.zstd"):
        assert captions(rows_of(tmp_path / name)) == [("a dog",), ("un caf\u00e9",)], name
    for name in ("a.tsv.gz", "a.tsv.bz2", "a.tsv.zst"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-6])
        with pytest.raises(PrepError, match="cannot be read as tsv"):
            rows_of(tmp_path / name)


def test_bytes_that_are_no_text_are_counted(tmp_path):
    """Latin-1 in a file of UTF-8, half a character in one of UTF-16."""
    (tmp_path / "a.tsv").write_bytes(TSV.encode("latin-1"))
    assert captions(rows_of(tmp_path / "a.tsv")) == [("a dog",), "invalid_utf8"]
    lines = [line.encode("utf-16-le") for line in TSV.splitlines(keepends=True)]
    (tmp_path / "b.tsv").write_bytes(b"\xff\xfe" + lines[0] + lines[1].replace(b"d\0", b"\0\xd8") + lines[2])
    assert captions(rows_of(tmp_path / "b.tsv")) == ["invalid_utf8", ("un caf\u00e9",)]


def test_a_nul_is_called_a_nul(tmp_path):
    (tmp_path / "a.tsv").write_bytes(TSV.replace("dog", "d\0g").encode())
    (tmp_path / "a.csv").write_bytes(b"url,caption\nhttp://h/0,d\0g\nhttp://h/1,\0\n")
    assert captions(rows_of(tmp_path / "a.tsv")) == ["nul_in_caption", ("un caf\u00e9",)]
    assert captions(rows_of(tmp_path / "a.csv")) == ["nul_in_caption"] * 2


def test_a_list_of_captions_is_several_captions_of_one_image(tmp_path):
    cells = [["a", "b"], [], ["c", "", None, 3], "d", None, [["e"]]]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"url": f"http://h/{n}", "caption": cell}) + "\n" for n, cell in enumerate(cells))
    )
    rows = rows_of(tmp_path / "a.jsonl")
    assert [row.captions for row in rows if isinstance(row, UrlRow)] == [("a", "b"), ("c",), ("d",)]
    assert [(row.name[:5], row.reason) for row in rows if isinstance(row, Rejection)] == [
        ("row 1", "empty_caption"),
        ("row 2", "empty_caption"),
        ("row 2", "empty_caption"),
        ("row 2", "malformed_row"),
        ("row 4", "empty_caption"),
        ("row 5", "malformed_row"),
    ]
    kind = pyarrow.list_(pyarrow.string())
    table = pyarrow.table(
        {"url": ["http://h/0", "ftp://h/1"], "caption": pyarrow.array([["a", "b"], ["c", "d"]], kind)}
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    first, second = rows_of(tmp_path / "a.parquet")
    assert first.captions == ("a", "b") and (second.reason, second.rows) == ("bad_url", 2)


def test_hugging_faces_structs_are_read_by_their_paths(tmp_path):
    """`image` and `caption` as structs, `sentences` as a list of them, as sets on the hub have them."""
    content = {
        "image": [
            {"bytes": b"\xff\xd8", "path": "1.jpg", "url": "http://h/1"},
            {"bytes": None, "path": "", "url": None},
        ],
        "caption": [{"raw": "a dog", "lang": "en"}, None],
        "sentences": [[{"raw": "one", "id": 1}, {"raw": "two", "id": 2}], []],
    }
    pyarrow.parquet.write_table(pyarrow.table(content), tmp_path / "a.parquet")
    rows = rows_of(tmp_path / "a.parquet", "image.url", "caption.raw", ["sentences.id", "image.path"])
    assert rows[0] == UrlRow(0, "http://h/1", ("a dog",), {"sentences.id": [1, 2], "image.path": "1.jpg"})
    assert captions(rows_of(tmp_path / "a.parquet", "image.url", "sentences.raw")) == [("one", "two"), "bad_url"]
    assert (
        captions(rows_of(tmp_path / "a.parquet", "image.url", "caption"))[0] == "malformed_row"
    )  # a struct is no text
    with pytest.raises(PrepError, match="no column url; found: image, image.bytes, image.path, image.url, caption"):
        rows_of(tmp_path / "a.parquet")
    lines = [{"image": {"url": "http://h/1"}, "caption": {"raw": "a dog"}}, {"image": "x", "caption": {}}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert captions(rows_of(tmp_path / "a.jsonl", "image.url", "caption.raw")) == [("a dog",), "bad_url"]
    with pytest.raises(PrepError, match="no column image.link"):
        rows_of(tmp_path / "a.jsonl", "image.link", "caption.raw")


def test_cells_that_are_no_value_of_their_type_are_counted(tmp_path):
    late = pyarrow.array([253402300800, 0], pyarrow.timestamp("s"))  # the year 10000, which Python does not have
    bad = pyarrow.array([b"ok", b"\xff"], pyarrow.binary())
    bad = pyarrow.Array.from_buffers(pyarrow.string(), 2, bad.buffers())
    nested = pyarrow.ListArray.from_arrays([0, 1, 2], bad)
    table = pyarrow.table({"url": ["http://h/0", "http://h/1"], "caption": nested, "at": late})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    rows = rows_of(tmp_path / "a.parquet", extra=["at"])
    assert captions(rows) == ["malformed_row", "invalid_utf8"] and "Unreadable" in rows[0].detail
    assert captions(rows_of(tmp_path / "a.parquet")) == [("ok",), "invalid_utf8"]
    assert rows_of(tmp_path / "a.parquet", url="url", caption="at")[0].reason == "malformed_row"


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("url,caption,url\nhttp://h/1,a,http://h/2\n")
    table = pyarrow.Table.from_arrays([pyarrow.array(["x"])] * 3, names=["url", "caption", "caption"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for name, column in (("a.csv", "url"), ("a.parquet", "caption")):
        with pytest.raises(PrepError, match=f"two columns are called {column}"):
            rows_of(tmp_path / name)


WORDS = st.text(
    st.characters(codec="utf-8", exclude_characters="\t\n\r\"'\0\u2028\u0085\x0b\x0c\x1c\x1d\x1e"), max_size=12
)
CELLS = st.lists(st.tuples(st.sampled_from(["http://h/x", "ftp://h", ""]), WORDS), max_size=8)
DAMAGE = st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=3)), max_size=3)
ENDS = st.sampled_from(["\n", "\r\n"])


def damaged(content: bytes, header: int, damage) -> bytes:
    """Bytes replaced anywhere below the header, by none that ends or quotes a line or makes it blank."""
    found = bytearray(content)
    for place, wanted in damage:
        position = header + place
        for offset, byte in enumerate(wanted):
            if (
                position + offset < len(found)
                and found[position + offset] not in b'\r\n\t,"'
                and byte not in b'\r\n",\t'
            ):
                found[position + offset] = byte
    return bytes(found)


@given(CELLS, DAMAGE, ENDS, st.booleans(), st.booleans(), st.sampled_from(["", "\n\n"]))
@example([("", "")], [], "\n", True, True, "")
def test_every_line_of_a_tsv_is_one_row_read_or_counted(cells, damage, end, mark, last, blank):
    """Invariant 8; the reference counts lines that hold a tab."""
    lines = ["url\tcaption", *(f"{url}\t{caption}" for url, caption in cells)]
    content = ("\ufeff" * mark + end.join(lines) + end * last + blank).encode()
    header = len(("\ufeff" * mark + lines[0] + end).encode())
    content = damaged(content, header, damage)
    expected = sum(b"\t" in line for line in content[header:].split(b"\n"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tsv"
        path.write_bytes(content)
        rows = rows_of(path)
    assert len(rows) == expected == len(cells)
    assert all(row.reason in REASONS and row.rows == 1 for row in rows if isinstance(row, Rejection))
    assert all(
        "\udc80" > character or character > "\udcff"
        for row in rows
        if isinstance(row, UrlRow)
        for character in row.captions[0]
    )


@given(CELLS, st.integers(0, 7), st.sampled_from([b"{", b"[]", b"\xff", b"nul", b'"x"', b"1e999999", b"\0"]), ENDS)
def test_every_line_of_jsonl_is_one_row_read_or_counted(cells, place, odd, end):
    lines = [json.dumps({"url": url, "caption": caption, "n": 1}).encode() for url, caption in cells]
    lines.insert(min(place, len(lines)), odd)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_bytes(end.encode().join(lines))
        rows = rows_of(path)
    assert len(rows) == len(lines) and sum(isinstance(row, Rejection) for row in rows) >= 1


@given(
    st.lists(st.one_of(st.none(), st.text(max_size=5), st.lists(st.one_of(st.none(), st.text(max_size=5)))), max_size=6)
)
def test_captions_in_lists_add_up(cells):
    """Each entry of a list is one caption, read or counted; a cell without any is one row."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_text("".join(json.dumps({"url": "http://h", "caption": cell}) + "\n" for cell in cells))
        rows = rows_of(path)
    found = sum(len(row.captions) if isinstance(row, UrlRow) else row.rows for row in rows)
    assert found == sum(max(1, len(cell)) if isinstance(cell, list) else 1 for cell in cells)


def test_a_folder_counts_the_rows_of_all_its_parts(tmp_path):
    """Parts of several kinds and compressions, each with its own order of columns."""
    (tmp_path / "a.csv").write_text('caption,url\r\n"x, y",http://h/0\r\nlone\r\n')
    (tmp_path / "b.tsv.gz").write_bytes(gzip.compress(TSV.encode()))
    (tmp_path / "c.jsonl").write_text('{"caption": "z", "url": "http://h/3", "n": 1}')
    rows = rows_of(tmp_path)
    assert captions(rows) == [("x, y",), "malformed_row", ("a dog",), ("un caf\u00e9",), ("z",)]
    assert [row["url"] for row in read_table(tmp_path / "c.jsonl", ["url"])] == ["http://h/3"]


TYPES = [
    pyarrow.array([1, None]),
    pyarrow.array([float("nan"), 0.5]),
    pyarrow.array([True, None]),
    pyarrow.array([None, None]),
    pyarrow.array([{"a": 1}, None]),
    pyarrow.array([[[b"\xff"]], None]),
    pyarrow.array([[("k", "v")], None], pyarrow.map_(pyarrow.string(), pyarrow.string())),
    pyarrow.array([2**62, 0], pyarrow.timestamp("ns")),
    pyarrow.array([2**62, 0], pyarrow.timestamp("ms")),
    pyarrow.array([2**31 - 1, -(2**31)], pyarrow.date32()),
    pyarrow.array([2**62, -1], pyarrow.duration("s")),
    pyarrow.array([b"ab", b"\xff\xff"], pyarrow.binary(2)),
    pyarrow.array(["x", "x"]).dictionary_encode(),
    pyarrow.array([["a"], ["b"]], pyarrow.list_(pyarrow.string(), 1)),
    pyarrow.array([2**64 - 1, 0], pyarrow.uint64()),
]


@pytest.mark.parametrize("column", TYPES, ids=lambda column: str(column.type))
def test_a_cell_of_any_type_is_read_or_counted(tmp_path, column):
    """As address, as caption and as further column: two rows come in, two are accounted for, and JSON can hold them."""
    good = pyarrow.array(["http://h/1", "http://h/2"])
    for url, caption in ((column, good), (good, column), (good, good)):
        table = pyarrow.table({"url": url, "caption": caption, "more": column})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        rows = rows_of(tmp_path / "a.parquet", extra=["more"])
        numbers = {row.number if isinstance(row, UrlRow) else int(row.name.split(":")[0][4:]) for row in rows}
        assert numbers == {0, 1}
        json.dumps([row.extra for row in rows if isinstance(row, UrlRow)], allow_nan=False, ensure_ascii=False).encode()


def test_a_damaged_parquet_file_is_one_line(tmp_path):
    table = pyarrow.table({"url": ["http://h/1"] * 50, "caption": [f"a dog {n}" for n in range(50)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    content, chance, refused = (tmp_path / "a.parquet").read_bytes(), random.Random(1), 0
    for _ in range(200):
        damaged = bytearray(content)
        for _ in range(chance.choice((1, 2, 8))):
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        (tmp_path / "a.parquet").write_bytes(damaged)
        try:
            rows_of(tmp_path / "a.parquet")
        except PrepError as error:
            refused += 1
            assert "\n" not in str(error) and str(error).isprintable()
    assert refused


def hub_file(path, numbers, **more):
    """A file as `datasets` writes it: images as structs of bytes and path, captions as lists or structs."""
    images = [{"bytes": picture(n), "path": f"{n}.jpg"} for n in numbers]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    content = {"image": pyarrow.array(images, kind), "caption": [[f"a {n}", f"the {n}"] for n in numbers], **more}
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(content), path)
    return path


def test_parquet_that_holds_the_images(tmp_path, capsys):
    hub_file(tmp_path / "in" / "train-00000-of-00002.parquet", range(3), id=[7, 8, 9])
    images = [{"bytes": None, "path": "x"}, {"bytes": b"<html>", "path": ""}, {"bytes": picture(9), "path": ""}]
    captions = [["x", "y"], ["z"], ["ok", " ", None]]
    table = pyarrow.table({"image": images, "caption": captions, "id": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "in" / "train-00001-of-00002.parquet")
    command = ["parquet", "--input", tmp_path / "in", "--output", tmp_path / "out", "--extra-columns", "id"]
    assert prepare(*command, "--dry-run") == 0 and not (tmp_path / "out").exists()
    assert "5 samples with 8 texts; unusable rows: 2 empty_caption, 2 missing_image" in capsys.readouterr().out
    assert prepare(*command) == 0
    split = tmp_path / "out" / "train"
    assert [(meta["captions"], meta["id"]) for meta in metas(split)] == [
        (["a 0", "the 0"], 7),
        (["a 1", "the 1"], 8),
        (["a 2", "the 2"], 9),
        (["ok"], 3),
    ]
    assert stored(split)["train_000000001.jpg"] == picture(1)
    assert read_manifest(split).rejected == {"empty_caption": 2, "missing_image": 2, "not_an_image": 1}


def test_images_in_a_column_of_bytes_and_captions_in_structs(tmp_path, capsys):
    content = {"jpg": [picture(1)], "sentences": [[{"raw": "one"}, {"raw": "two"}]]}
    pyarrow.parquet.write_table(pyarrow.table(content), tmp_path / "a.parquet")
    command = ["parquet", "--input", tmp_path / "a.parquet", "--output", tmp_path / "out", "--split", "dev"]
    assert prepare(*command) == 2
    assert "no column image, caption; found: jpg, sentences, sentences.raw" in capsys.readouterr().err
    assert prepare(*command, "--image-column", "jpg", "--caption-column", "sentences.raw") == 0
    assert [meta["captions"] for meta in metas(tmp_path / "out" / "dev")] == [["one", "two"]]
    assert list(stored(tmp_path / "out" / "dev")) == ["dev_000000000.jpg"]
