"""CC3M, CC12M, SBU, LAION and Kaggle's Flickr8k: small files of exactly the published schema, and a real one."""

import io
import json
import os
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data_prep.__main__ import main
from data_prep.filters import REASONS
from data_prep.record import PrepError, Rejection, UrlRow
from data_prep.sources.conceptual import conceptual_columns, conceptual_rows, split_of_name
from data_prep.sources.flickr8k import drawn_splits
from data_prep.sources.laion import Scores, laion_rows
from data_prep.sources.sbu import CAPTIONS, URLS, sbu_files, sbu_rows
from data_prep.verbs import corpora
from tests.data_prep.annotations.prepared import metas, picture, prepare, put, rejected

REAL = Path(os.environ.get("OPENFLM_DATA", Path(__file__).resolve().parents[4] / "shared" / "data"))
VALIDATION = REAL / "cc3m" / "Validation_GCC-1.1.0-Validation.tsv"


def read_conceptual(path):
    columns, url_and_caption = conceptual_columns(path)
    return columns, list(conceptual_rows(path, columns, url_and_caption))


def pairs(rows):
    return [(row.url, *row.captions) for row in rows if isinstance(row, UrlRow)]


def counted(rows):
    """Captions read, however they end."""
    return sum(len(row.captions) if isinstance(row, UrlRow) else row.rows for row in rows)


CC3M = [("author : a life in photography -- in pictures", "https://h/1"), ('a "very" long line , really', "http://h/2")]


@pytest.mark.parametrize("end", ["\n", ""])
def test_cc3m_has_the_caption_first_and_no_header(tmp_path, end):
    path = tmp_path / "Train_GCC-training.tsv"
    path.write_text("\n".join(f"{caption}\t{url}" for caption, url in CC3M) + end)
    columns, rows = read_conceptual(path)
    assert columns == ["caption", "url"] and pairs(rows) == [(url, caption) for caption, url in CC3M]
    assert split_of_name(path) == "train" and split_of_name(Path("Validation_GCC-1.1.0-Validation.tsv")) == "dev"


def test_cc12m_has_the_address_first_and_no_header(tmp_path):
    path = tmp_path / "cc12m.tsv"
    path.write_text("http://h/1\ta dog\nhttp://h/2\tsee https://h/3\nhttp://h/4\t\nno address\ta cat\n")
    columns, rows = read_conceptual(path)
    assert columns == ["url", "caption"] and pairs(rows) == [("http://h/1", "a dog"), ("http://h/2", "see https://h/3")]
    assert [(row.reason, row.name) for row in rows if isinstance(row, Rejection)] == [
        ("empty_caption", "row 2: http://h/4"),
        ("bad_url", "row 3: no address"),
    ]


@pytest.mark.parametrize("header", ["url\tcaption", "caption\turl", "\ufeffcaption\timage_url", None, "\ufeff"])
def test_swapped_columns_headers_and_marks_are_seen(tmp_path, header, capsys):
    """Copies of both sets have them in either order, img2dataset's instructions add a header line."""
    caption_first = header is None or not header.startswith("url")
    lines = [f"{c}\t{u}" if caption_first else f"{u}\t{c}" for c, u in CC3M]
    (tmp_path / "cc12m.tsv").write_text(
        "\n".join([header] * (header not in (None, "\ufeff")) + lines), encoding="utf-8"
    )
    if header == "\ufeff":
        (tmp_path / "cc12m.tsv").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    _, rows = read_conceptual(tmp_path / "cc12m.tsv")
    assert pairs(rows) == [(url, caption) for caption, url in CC3M] and counted(rows) == 2
    assert main(["cc12m", "--input", str(tmp_path / "cc12m.tsv"), "--dry-run"]) == 0
    said = "caption first, unlike the published file; read so" in capsys.readouterr().out
    assert said == (header in (None, "\ufeff"))


def test_cc3m_with_image_labels(tmp_path, capsys):
    path = tmp_path / "Image_Labels_Subset_Train_GCC-Labels-training.tsv"
    path.write_text(
        "a dog\thttp://h/1\tdog,pet\t/m/0bt9lr,/m/068hy\t0.97,0.5\n"
        "a cat\thttp://h/2\tcat\t/m/01yrx,/m/068hy\t0.9\n"
        "a cow\thttp://h/3\tcow\t/m/01xq0k1\tmuch\n"
    )
    _, rows = read_conceptual(path)
    assert rows[0].extra == {"labels": ["dog", "pet"], "mids": ["/m/0bt9lr", "/m/068hy"], "confidences": [0.97, 0.5]}
    assert [row.reason for row in rows[1:]] == ["malformed_row", "malformed_row"]
    assert "different lengths" in rows[1].detail
    assert main(["cc3m", "--input", str(path), "--dry-run"]) == 0
    assert "cc3m train, with image labels: 3 rows (published: 2,007,090," in capsys.readouterr().out


def test_other_tables_are_refused_in_one_line(tmp_path, capsys):
    for content, expected in (
        ("", "holds no line"),
        ("a\tb\n", "0 of 1 with an address"),
        ("http://h/1\n", "1 cells in most lines"),
        ("a\tb\thttp://h/1\n", "3 cells in most lines"),
    ):
        (tmp_path / "x.tsv").write_text(content)
        assert main(["cc3m", "--input", str(tmp_path / "x.tsv"), "--output", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1
    assert main(["cc3m", "--input", str(tmp_path / "Train_GCC-training.tsv")]) == 2
    error = capsys.readouterr().err
    assert "no such file" in error and "ai.google.com/research/ConceptualCaptions/download" in error
    assert not (tmp_path / "out").exists()


def test_the_published_validation_file_of_cc3m():
    """The file itself; the reference splits it by hand."""
    if not VALIDATION.is_file():
        pytest.skip(f"no {VALIDATION}: set OPENFLM_DATA to a folder that holds cc3m/{VALIDATION.name}")
    columns, rows = read_conceptual(VALIDATION)
    lines = VALIDATION.read_bytes().decode().removesuffix("\n").split("\n")
    assert columns == ["caption", "url"] and len(lines) == 15833
    assert pairs(rows) == [tuple(reversed(line.split("\t"))) for line in lines]


SBU = [
    ("http://static.flickr.com/1/a.jpg", "A wooden chair"),
    ("http://static.flickr.com/2/b.jpg", "the \u2028 sea, again"),
]


def sbu_forms(folder):
    """The same photographs in each form in which they are published."""
    urls, captions = zip(*SBU)
    lists = {URLS: "\n".join(urls) + "\n", CAPTIONS: "\n".join(captions) + "\n"}
    for name, content in lists.items():
        put(folder / "lists" / "SBUCaptionedPhotoDataset" / name, content.encode())
        put(folder / "flat" / name, content.encode().replace(b"\n", b"\r\n"))
    document = json.dumps({"image_urls": urls, "user_ids": ["1", "2"], "captions": captions}).encode()
    put(folder / "sbu-captions-all.json", document)
    put(folder / "folder" / "sbu-captions-all.json", document)
    for name, content in (("all", {"sbu-captions-all.json": document}), ("lists", lists)):
        with tarfile.open(folder / f"{name}.tar.gz", "w:gz") as tar:
            for member, data in content.items():
                data = data if isinstance(data, bytes) else data.encode()
                info = tarfile.TarInfo(f"SBUCaptionedPhotoDataset/{member}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return [
        folder / name for name in ("lists", "flat", "folder", "sbu-captions-all.json", "all.tar.gz", "lists.tar.gz")
    ]


def test_every_form_of_sbu_gives_the_same_rows(tmp_path):
    for form in sbu_forms(tmp_path):
        rows = list(sbu_rows(sbu_files(form)))
        assert pairs(rows) == SBU and [row.number for row in rows] == [0, 1], form


def test_sbu_lists_of_unequal_length_are_refused(tmp_path, capsys):
    sbu_forms(tmp_path)
    with open(tmp_path / "flat" / CAPTIONS, "a") as stream:
        stream.write("one more\n")
    assert main(["sbu", "--input", str(tmp_path / "flat"), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert "2 addresses and 3 captions" in error and error.count("\n") == 1
    put(tmp_path / "empty" / "readme", b"")
    assert main(["sbu", "--input", str(tmp_path / "empty")]) == 2
    assert "cs.rice.edu/~vo9/sbucaptions" in capsys.readouterr().err
    put(tmp_path / "x.json", b'{"image_urls": []}')
    with pytest.raises(PrepError, match='the lists "image_urls" and "captions"'):
        list(sbu_rows([tmp_path / "x.json"]))


def test_odd_entries_of_sbu_are_counted(tmp_path):
    content = {
        "image_urls": ["http://h/1", 5, "ftp://h/2", "http://h/3", "http://h/4"],
        "captions": ["a", "b", "c", None, 7],
    }
    put(tmp_path / "s.json", json.dumps(content).encode())
    rows = list(sbu_rows([tmp_path / "s.json"]))
    assert [getattr(row, "reason", "") for row in rows] == ["", "bad_url", "bad_url", "empty_caption", "malformed_row"]


LAION_VARIANTS = {  # columns as they are called in the published files
    "400m": {"SAMPLE_ID": [1.0], "URL": ["http://h/0"], "TEXT": ["a"], "HEIGHT": [3.0], "WIDTH": [4.0]}
    | {"LICENSE": ["?"], "NSFW": ["UNLIKELY"], "similarity": [0.33]},
    "2b-joined": {"URL": ["http://h/1"], "TEXT": ["b"], "WIDTH": [4], "HEIGHT": [3], "similarity": [0.31]}
    | {"punsafe": [0.1], "pwatermark": [0.2], "hash": [77], "AESTHETIC_SCORE": [5.0]},
    "coco": {"URL": ["http://h/2"], "TEXT": ["alt"], "top_caption": ["c"], "all_captions": [["c", "d", ""]]}
    | {"similarity": [0.3], "punsafe": ["0.9"], "pwatermark": [None], "hash": [78]},
    "relaion": {"url": ["http://h/3"], "caption": ["d"], "similarity": [0.2], "md5": ["ff"], "punsafe": [None]},
}


def laion_folder(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        pyarrow.parquet.write_table(pyarrow.table(LAION_VARIANTS[name]), folder / f"part-{number}-{name}.parquet")
    return sorted(folder.iterdir())


def test_each_file_of_laion_is_read_by_its_own_columns(tmp_path):
    rows = list(laion_rows(laion_folder(tmp_path, *LAION_VARIANTS), Scores()))
    assert pairs(rows) == [("http://h/0", "a"), ("http://h/1", "b"), ("http://h/2", "c"), ("http://h/3", "d")]
    assert [row.number for row in rows] == [0, 1, 2, 3]
    assert rows[0].extra == {"nsfw": "UNLIKELY", "similarity": 0.33, "license": "?", "sample_id": 1.0}
    assert rows[1].extra == {"punsafe": 0.1, "similarity": 0.31, "pwatermark": 0.2, "hash": 77}
    assert rows[3].extra["hash"] == "ff"


def test_rows_of_laion_beyond_the_wanted_scores_are_counted(tmp_path):
    files = laion_folder(tmp_path, "2b-joined", "coco", "relaion")
    for wanted, expected in (
        (Scores(max_punsafe=0.5), ["", "unsafe_image", "unsafe_image"]),  # a score that is missing is no proof
        (Scores(min_similarity=0.3), ["", "", "low_similarity"]),
        (Scores(max_punsafe=0.1), ["", "unsafe_image", "unsafe_image"]),
    ):
        rows = list(laion_rows(files, wanted))
        assert [getattr(row, "reason", "") for row in rows] == expected and set(expected) - {""} <= set(REASONS)
    rows = list(laion_rows(files[:2], Scores(max_watermark=0.5)))
    assert [getattr(row, "reason", "") for row in rows] == ["", "watermark"] and "missing" in rows[1].detail
    files = laion_folder(tmp_path / "labels", "400m")
    assert pairs(laion_rows(files, Scores(nsfw=("unlikely", "UNSURE")))) and not pairs(
        laion_rows(files, Scores(nsfw=("NSFW",)))
    )


def test_several_captions_of_laion_coco_are_one_image(tmp_path):
    rows = list(laion_rows(laion_folder(tmp_path, "2b-joined", "coco")[1:], Scores(), "all_captions"))
    assert [(row.reason, row.rows) for row in rows[:1]] == [("empty_caption", 1)]
    assert rows[1].captions == ("c", "d") and counted(rows) == 3


def test_a_score_without_a_column_is_refused(tmp_path, capsys):
    laion_folder(tmp_path, "2b-joined", "400m")
    assert main(["laion", "--input", str(tmp_path), "--max-punsafe", "0.5", "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "part-1-400m.parquet: no column of punsafe (found: SAMPLE_ID, URL," in error and error.count("\n") == 1
    (tmp_path / "empty").mkdir()
    assert main(["laion", "--input", str(tmp_path / "empty")]) == 2 and "laion.ai" in capsys.readouterr().err


def kaggle(folder):
    names = [f"{number}_ab.jpg" for number in range(40)]
    lines = [f'{name},a dog runs .\n{name},"a dog , a ""big"" one , runs ."\n' for name in names]
    put(folder / "captions.txt", ("image,caption\n" + "".join(lines) + "gone.jpg,not there\n").encode())
    for number, name in enumerate(names):
        put(folder / "Images" / name, picture(number))
    return names


def test_flickr8k_in_kaggles_form(tmp_path, capsys):
    names = kaggle(tmp_path / "in")
    command = ["flickr8k", "--input", tmp_path / "in", "--output", tmp_path / "out"]
    assert prepare(*command) == 2
    assert "--dev-share 0.1, or 0 to train on all; download Flickr8k_Dataset.zip" in capsys.readouterr().err
    assert prepare(*command, "--dev-share", "0") == 0
    train = metas(tmp_path / "out" / "train")
    assert [meta["file"] for meta in train] == names and not (tmp_path / "out" / "dev").exists()
    assert train[0]["captions"] == ["a dog runs .", 'a dog , a "big" one , runs .']
    assert rejected(tmp_path / "out" / "train") == [("missing_image", "gone.jpg", 1)]


def test_images_drawn_for_dev_depend_on_name_and_seed_alone():
    names = [f"{number}.jpg" for number in range(4000)]
    splits = drawn_splits(names, 0.25, 3)
    assert splits["dev"] == drawn_splits(names[::-1], 0.25, 3)["dev"][::-1] != drawn_splits(names, 0.25, 4)["dev"]
    assert sorted(splits["train"] + splits["dev"]) == sorted(names)
    assert abs(len(splits["dev"]) - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5  # five standard deviations
    assert list(drawn_splits(names, 0, 3)) == ["train"]


def test_a_corpus_verb_hands_its_rows_to_the_download(tmp_path, monkeypatch, capsys):
    """The rows, the split and a request that is the same when it is stored as JSON and read again."""
    path = tmp_path / "Validation_GCC-1.1.0-Validation.tsv"
    path.write_text("".join(f"{caption}\t{url}\n" for caption, url in CC3M))
    given = []
    monkeypatch.setattr(corpora, "begin", lambda args: given.append(args.split))
    monkeypatch.setattr(corpora, "download_rows", lambda args, rows, request: given.extend([list(rows), request]) or 0)
    assert main(["cc3m", "--input", str(path)]) == 0
    split, rows, request = given
    assert split == "dev" and len(rows) == 2 and json.loads(json.dumps(request)) == request
    assert request["corpus"] == "cc3m" and request["columns"] == ["caption", "url"]
    assert "cc3m dev: 2 rows (published: 15,840, 15,838 fewer)" in capsys.readouterr().out
