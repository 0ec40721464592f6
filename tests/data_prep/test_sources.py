"""Tables of URLs and Flickr8k's files: what is read, and what is named as unreadable."""

import gzip
import io
import json

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from data_prep.__main__ import main
from data_prep.fetch import UrlRow, failure_reason
from data_prep.info import row_texts
from data_prep.manifest import read_manifest
from data_prep.record import PrepError, Rejection
from data_prep.sources import read_flickr8k_captions, url_rows
from data_prep.tables import read_table

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
        assert [(r.number, r.url, r.caption, str(r.extra["n"])) for r in rows] == [
            (i, u, c, str(n)) for i, (u, c, n) in enumerate(ROWS)
        ], name


def test_a_file_without_header_and_columns_named(tmp_path):
    path = tmp_path / "cc3m.tsv"
    path.write_text("a dog\thttp://h/1.jpg\na cat\thttp://h/2.jpg\n")
    rows = rows_of(path, (), columns=["caption", "url"])
    assert [(row.caption, row.url) for row in rows] == [("a dog", "http://h/1.jpg"), ("a cat", "http://h/2.jpg")]
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
    assert rows[0] == UrlRow(0, "http://h/1.jpg", "fine", {"more": [1]})
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
