"""Tables of URLs and Flickr8k's files: what is read, and what is named as unreadable."""

import csv
import datetime
import decimal
import gzip
import io
import json
import tempfile
from pathlib import Path

import pandas
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_prep.__main__ import main
from data_prep.checks.info import row_texts
from data_prep.downloading.failures import failure_reason
from data_prep.manifest import read_manifest
from data_prep.record import PrepError, Rejection, UrlRow
from data_prep.sources.flickr8k import distinct_keys, read_flickr8k_captions, read_names
from data_prep.sources.tables import read_table
from data_prep.sources.url_table import url_rows

ROWS = [("http://h/1.jpg", 'a "quoted" dog', 3), ("http://h/2.jpg", "two, with comma", 4)]


def rows_of(path, extra=("n",), json_columns=(), **options):
    return list(url_rows(path, "url", "caption", list(extra), list(json_columns), **options))


def test_every_format_gives_the_same_rows(tmp_path):
    tsv = "url\tcaption\tn\n" + "".join(f"{u}\t{c}\t{n}\n" for u, c, n in ROWS)
    (tmp_path / "a.tsv").write_text(tsv)
    (tmp_path / "bom.tsv").write_text("\ufeff" + tsv.replace("\n", "\r\n"))
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(tsv.encode()))
    quoted = [c.replace('"', '""') for _, c, _ in ROWS]
    (tmp_path / "a.csv").write_text(
        "url,caption,n\n" + "".join(f'{u},"{q}",{n}\n' for (u, _, n), q in zip(ROWS, quoted, strict=True))
    )
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"url": u, "caption": c, "n": n}) for u, c, n in ROWS) + "\n\n"
    )
    table = pyarrow.table({"n": [r[2] for r in ROWS], "url": [r[0] for r in ROWS], "caption": [r[1] for r in ROWS]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for name in ("a.tsv", "bom.tsv", "a.tsv.gz", "a.csv", "a.jsonl", "a.parquet"):
        rows = rows_of(tmp_path / name)
        assert [(r.number, r.url, r.captions[0], str(r.extra["n"])) for r in rows] == [
            (i, u, c, str(n)) for i, (u, c, n) in enumerate(ROWS)
        ], name


def test_a_file_without_header_and_columns_named(tmp_path):
    path = tmp_path / "cc3m.tsv"
    path.write_text("a dog\thttp://h/1.jpg\na cat\thttp://h/2.jpg\n")
    rows = rows_of(path, (), columns=["caption", "url"])
    assert [(row.captions[0], row.url) for row in rows] == [("a dog", "http://h/1.jpg"), ("a cat", "http://h/2.jpg")]
    with pytest.raises(PrepError, match=r"no column url, caption; found: a dog, http://h/1.jpg.*--columns"):
        rows_of(path, ())


def test_unusable_rows_are_named_by_reason(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_bytes(
        b"url\tcaption\tmore\n"
        b"http://h/1.jpg\tfine\t[1]\n"
        b"http://h/2.jpg\tcaf\xe9\t1\n"
        b"http://h/3.jpg\t  \t1\n"
        b"file:///etc/passwd\tlocal\t1\n"
        b"\tno url\t1\n"
        b"http://h/6.jpg\ttoo\tmany\tcells\n"
        b"http://h/7.jpg\tnot JSON\t{\n"
    )
    rows = rows_of(path, (), ["more"])
    assert rows[0] == UrlRow(0, "http://h/1.jpg", ("fine",), {"more": [1]})
    expected = ["invalid_utf8", "empty_caption", "bad_url", "bad_url", "malformed_row", "malformed_row"]
    assert [row.reason for row in rows[1:]] == expected


def test_jsonl_and_parquet_oddities(tmp_path):
    lines = [b'{"url":"http://h/1","caption":"x"}', b"[1]", b"{", b'{"url":"http://h/2"}', b'{"caption":"c","url":5}']
    lines.append(b'{"url":"http://h/3","caption":"\\ud800"}')
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    rows = rows_of(tmp_path / "a.jsonl", ())
    expected = ["malformed_row", "malformed_row", "empty_caption", "bad_url", "invalid_utf8"]
    assert [row.reason for row in rows if isinstance(row, Rejection)] == expected
    raw = pyarrow.array([b"ok", b"caf\xe9", None], pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())
    table = pyarrow.table({"url": ["http://h/1"] * 3, "caption": column})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    rows = rows_of(tmp_path / "a.parquet", ())
    assert [getattr(row, "reason", "kept") for row in rows] == ["kept", "invalid_utf8", "empty_caption"]


def test_unreadable_inputs_are_one_line(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    (tmp_path / "a.tsv.gz").write_bytes(b"no gzip")
    (tmp_path / "a.xyz").write_text("")
    (tmp_path / "a.csv").write_text("")
    (tmp_path / "b.jsonl").write_text('{"link": "x"}')
    for name, expected in (
        ("a.parquet", "parquet"),
        ("a.tsv.gz", "tsv"),
        ("a.xyz", "--format"),
        ("a.csv", "found: none"),
        ("b.jsonl", "no column url, caption; found: link"),
        ("absent.csv", "no such file"),
    ):
        with pytest.raises(PrepError, match=expected) as caught:
            rows_of(tmp_path / name, ())
        assert "\n" not in str(caught.value)
    with pytest.raises(PrepError, match="without header"):
        list(read_table(tmp_path / "b.jsonl", ["url"], columns=["url"]))


def test_download_errors_have_reasons():
    for message, reason in (
        ("HTTP Error 404: Not Found", "http_404"),
        ("<urlopen error [Errno -2] Name or service not known>", "dns_failure"),
        ("<urlopen error [Errno 111] Connection refused>", "connection_failed"),
        ("The read operation timed out", "timeout"),
        ("name resolution timed out", "dns_failure"),
        ("h.test leads to a private address (10.0.0.1); --allow-private-addresses takes it", "private_address"),
        ("address is not http(s)", "bad_url"),
        ("[Errno 113] No route to host", "connection_failed"),
        ("timed out: response not complete within the bound", "timeout"),
        ("response larger than the bound", "image_bytes_too_large"),
        ("Use of image disallowed by X-Robots-Tag directive", "disallowed_by_server"),
        ("something else", "download_failed"),
    ):
        assert failure_reason(message) == reason


def jpeg(grey):
    stream = io.BytesIO()
    Image.new("L", (32, 32), grey).save(stream, "JPEG")
    return stream.getvalue()


def make_flickr8k(folder):
    (folder / "images").mkdir(parents=True)
    lines = []
    for number in range(4):
        (folder / "images" / f"{number}_ab.jpg").write_bytes(jpeg(40 * number))
        lines += [f"{number}_ab.jpg#{k}\tcaption {k} of {number} ." for k in (1, 0, 2, 3, 4)]
    lines += ["gone.jpg#0\tnot there", "no tab here"]
    (folder / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n")
    (folder / "Flickr_8k.trainImages.txt").write_text("0_ab.jpg\n1_ab.jpg\ngone.jpg\n1_ab.jpg\n../x.jpg\n")
    (folder / "Flickr_8k.devImages.txt").write_text("2_ab.jpg\n")


def test_flickr8k_gives_five_rows_an_image(tmp_path, capsys):
    """Invariant 8: every row of a split list is written or counted by reason."""
    make_flickr8k(tmp_path / "in")
    arguments = [
        "flickr8k",
        "--input",
        str(tmp_path / "in"),
        "--output",
        str(tmp_path / "out" / "f8k"),
        "--workers",
        "1",
    ]
    assert main(arguments) == 0
    assert "10 rows, 2 samples" in capsys.readouterr().out
    train, dev = (read_manifest(tmp_path / "out" / "f8k" / split) for split in ("train", "dev"))
    assert (train.rows, train.samples, dev.rows, train.corpus) == (10, 2, 5, "f8k")
    assert train.rejected == {"duplicate_key": 5, "malformed_row": 1, "missing_image": 2}
    texts = list(row_texts(tmp_path / "out" / "f8k" / "dev", dev))
    assert texts == [f"caption {k} of 2 ." for k in range(5)]
    assert main(arguments) == 2 and "--overwrite" in capsys.readouterr().err


def test_flickr8k_says_what_is_missing(tmp_path, capsys):
    make_flickr8k(tmp_path / "in")
    for name in ("Flickr_8k.trainImages.txt", "Flickr_8k.devImages.txt"):
        (tmp_path / "in" / name).unlink()
    assert main(["flickr8k", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]) == 2
    assert "Flickr_8k.trainImages.txt" in capsys.readouterr().err
    assert main(["flickr8k", "--input", str(tmp_path / "nowhere")]) == 2
    assert "no folder of images" in capsys.readouterr().err
    (tmp_path / "captions").write_text("a b c\n")
    with pytest.raises(PrepError, match="NAME#k"):
        read_flickr8k_captions(tmp_path / "captions")


def reasons(rows):
    return [row.reason if isinstance(row, Rejection) else row.captions[0] for row in rows]


def test_binary_columns_of_parquet_are_text(tmp_path):
    for number, kind in enumerate((pyarrow.binary(), pyarrow.large_binary(), pyarrow.binary(2), pyarrow.string_view())):
        content = ["ab", "cd"] if kind == pyarrow.string_view() else [b"ab", b"\xff\xfe"]
        table = pyarrow.table({"url": ["http://h/1", "http://h/2"], "caption": pyarrow.array(content, kind)})
        pyarrow.parquet.write_table(table, tmp_path / f"{number}.parquet")
        second = "cd" if kind == pyarrow.string_view() else "invalid_utf8"
        assert reasons(rows_of(tmp_path / f"{number}.parquet", ())) == ["ab", second], kind
    words = pyarrow.array([b"a cat", b"a cat"]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"url": ["http://h/1"] * 2, "caption": words}), tmp_path / "d.parquet")
    assert reasons(rows_of(tmp_path / "d.parquet", ())) == ["a cat", "a cat"]


def test_what_is_no_text_is_no_caption(tmp_path):
    captions = ["NaN", '{"en": "a"}', "true", "3.5", "7", "[]", "null", '"a cat"']
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"url": "http://h/{n}", "caption": {c}}}\n' for n, c in enumerate(captions)))
    rows = rows_of(path, ())
    assert reasons(rows) == ["empty_caption", *["malformed_row"] * 5, "empty_caption", "a cat"]
    assert rows[1].detail == "the caption is of type dict: {'en': 'a'}" and rows[1].name == "row 1: http://h/1"


def test_a_byte_order_mark_is_no_part_of_the_content(tmp_path):
    for name, text, columns in (
        ("a.csv", '"url","caption"\r\n"http://h/1","a cat"\r\n', None),
        ("a.tsv", "a cat\thttp://h/1\n", ["caption", "url"]),
        ("b.csv", "a cat,http://h/1\n", ["caption", "url"]),
        ("a.jsonl", '{"url": "http://h/1", "caption": "a cat"}\n', None),
    ):
        for start, encoding in (("", "utf-8"), ("\ufeff", "utf-8"), ("", "utf-16"), ("\ufeff", "utf-16-be")):
            (tmp_path / name).write_text(start + text, encoding=encoding)
            rows = rows_of(tmp_path / name, (), columns=columns)
            assert [(row.url, row.captions[0]) for row in rows] == [("http://h/1", "a cat")], (name, start, encoding)
    make_flickr8k(tmp_path / "in")
    for name in ("Flickr8k.token.txt", "Flickr_8k.trainImages.txt", "Flickr_8k.devImages.txt"):
        path = tmp_path / "in" / name
        path.write_text("\ufeff" + path.read_text())
    captions, problems = read_flickr8k_captions(tmp_path / "in" / "Flickr8k.token.txt")
    assert len(captions["0_ab.jpg"]) == 5 and len(problems) == 1
    assert read_names(tmp_path / "in" / "Flickr_8k.devImages.txt") == ["2_ab.jpg"]


STRAY = [
    'http://h/0,"a dog',  # opened, and closed three lines later
    "http://h/1,a cat",
    "http://h/2,a cow",
    'http://h/3,a hen"',
    'http://h/4,a "big" pig',
    'http://h/5,"a sheep, and\na goat"',  # two lines, as it should be
    'http://h/6,"a duck',  # never closed
    "http://h/7,a mouse",
]


@pytest.mark.parametrize("lines", [STRAY, STRAY[4:], STRAY[:4], STRAY[:2] + STRAY[4:6], STRAY[6:], STRAY[:1]])
def test_a_stray_quotation_mark_swallows_no_row(tmp_path, lines):
    """Every address of the file is in exactly one row, read or counted."""
    path = tmp_path / "a.csv"
    path.write_text("url,caption\n" + "".join(f"{line}\n" for line in lines))
    rows = rows_of(path, ())
    urls = [row.url for row in rows if isinstance(row, UrlRow)]
    rejected = [row for row in rows if isinstance(row, Rejection)]
    assert len(urls) + sum(row.rows for row in rejected) == path.read_text().count("http://") and not rejected
    assert urls == [line.split(",")[0] for line in lines]
    captions = {row.url: row.captions[0] for row in rows}
    if lines is STRAY:
        assert captions["http://h/5"] == "a sheep, and\na goat" and captions["http://h/7"] == "a mouse"


@given(st.lists(st.text('ab",\n ', min_size=1, max_size=8), min_size=1, max_size=6))
def test_well_formed_csv_is_read_as_the_standard_library_reads_it(cells):
    """Invariant 8; the reference is csv.reader on what csv.writer wrote."""
    stream = io.StringIO()
    csv.writer(stream).writerows([["url", "caption"], *([f"u{n}", cell] for n, cell in enumerate(cells))])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.csv"
        path.write_text(stream.getvalue(), newline="")
        rows = list(read_table(path, ["url", "caption"]))
    assert [row["caption"] for row in rows] == cells


def test_a_tsv_as_pandas_writes_it(tmp_path):
    captions = ['a "big" dog', "a cat", '"stop"']
    table = pandas.DataFrame({"url": [f"http://h/{n}" for n in range(3)], "caption": captions})
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
        table.to_csv(tmp_path / "a.tsv", sep="\t", index=False, quoting=quoting)
        assert [row.captions[0] for row in rows_of(tmp_path / "a.tsv", ())] == captions
    (tmp_path / "raw.tsv").write_text('url\tcaption\nhttp://h/1\t"stop" said "he"\nhttp://h/2\t"a dog"\n')
    assert [row.captions[0] for row in rows_of(tmp_path / "raw.tsv", ())] == ['"stop" said "he"', '"a dog"']


def test_further_columns_become_json(tmp_path):
    moment = datetime.datetime(2026, 1, 2, 3, 4, 5)
    further = {
        "at": [moment, None],
        "day": [moment.date(), None],
        "price": [decimal.Decimal("1.50"), None],
        "score": [float("nan"), 0.5],
        "boxes": [[{"x": float("inf")}], None],
        "long": [datetime.timedelta(seconds=90), None],
        "text": [b"caf\xc3\xa9", None],
    }
    table = {"url": ["http://h/1", "http://h/2"], "caption": ["x", "y"]} | further
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    first, second = rows_of(tmp_path / "a.parquet", list(further))
    assert first.extra == {
        "at": "2026-01-02T03:04:05",
        "day": "2026-01-02",
        "price": "1.50",
        "score": None,
        "boxes": [{"x": None}],
        "long": "0:01:30",
        "text": "café",
    }
    assert second.extra == dict.fromkeys(further) | {"score": 0.5}
    (tmp_path / "a.jsonl").write_text('{"url": "http://h/1", "caption": "x", "n": NaN, "b": "\\ud800"}\n')
    assert rows_of(tmp_path / "a.jsonl", ["n"])[0].extra == {"n": None}
    assert reasons(rows_of(tmp_path / "a.jsonl", ["b"])) == ["invalid_utf8"]
    (tmp_path / "b.jsonl").write_text('{"url": "http://h/1", "caption": "x", "j": "[NaN]"}\n')
    assert rows_of(tmp_path / "b.jsonl", (), ["j"])[0].extra == {"j": [None]}


def test_a_column_may_be_absent_from_some_rows_of_jsonl(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"url": "http://h/0", "caption": "x"}\n{"url": "http://h/1", "caption": "y", "n": 1}\n'
    )
    assert [row.extra for row in rows_of(tmp_path / "a.jsonl", ["n"])] == [{"n": None}, {"n": 1}]
    with pytest.raises(PrepError, match="no column m; found: url, caption, n"):
        rows_of(tmp_path / "a.jsonl", ["m"])


def test_a_folder_of_parts_is_one_table(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    for part in (1, 0):
        table = pyarrow.table({"url": [f"http://h/{part}{n}" for n in range(2)], "caption": ["x", ""]})
        pyarrow.parquet.write_table(table, folder / f"part-{part:05d}.parquet")
    for name in ("_SUCCESS", ".part-00000.parquet.crc", "README.md"):
        (folder / name).write_text("no table")
    rows = rows_of(folder, ())
    assert [(row.number, row.url) for row in rows if isinstance(row, UrlRow)] == [
        (0, "http://h/00"),
        (2, "http://h/10"),
    ]
    assert [row.name for row in rows if isinstance(row, Rejection)] == ["row 1: http://h/01", "row 3: http://h/11"]
    with pytest.raises(PrepError, match="a folder without a table; expected a TSV"):
        rows_of(tmp_path, ())


def test_rejected_rows_are_counted_in_one_way(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("url\tcaption\nhttp://h/0\tx\none cell\nhttp://h/2\t \nhttp://h/3\ty\n")
    rows = rows_of(path, ())
    assert [row.name.split(":")[0] for row in rows if isinstance(row, Rejection)] == ["row 1", "row 2"]
    assert rows[1].detail == "line 3 of a.tsv: 1 cells, expected 2" and rows[3].number == 3


def test_two_images_of_one_stem_are_two_samples(tmp_path, capsys):
    """Keys of names that share no stem are their stems, as in corpora prepared before."""
    assert distinct_keys(["x.jpg", "y.jpg", "x.png", "x.jpg", "a b.jpg", "a_b.jpg", "x_png.gif"]) == {
        "x.jpg": "x",
        "y.jpg": "y",
        "x.png": "x_png",
        "a b.jpg": "a_b",
        "a_b.jpg": "a_b_jpg",
        "x_png.gif": "x_png_gif",
    }
    make_flickr8k(tmp_path / "in")
    Image.new("L", (32, 32), 200).save(tmp_path / "in" / "images" / "2_ab.png")
    with open(tmp_path / "in" / "Flickr8k.token.txt", "a") as stream:
        stream.write("2_ab.png#0\ta caption of its own\n")
    (tmp_path / "in" / "Flickr_8k.devImages.txt").write_text("2_ab.jpg\n2_ab.png\n")
    (tmp_path / "in" / "Flickr_8k.trainImages.txt").unlink()
    assert main(["flickr8k", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--workers", "1"]) == 0
    dev = read_manifest(tmp_path / "out" / "dev")
    assert (dev.rows, dev.samples) == (6, 2) and "duplicate_key" not in dev.rejected
