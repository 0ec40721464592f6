"""Every form in which own captions come becomes the same corpus, and what can't be used is named with its row."""

import csv
import gzip
import io
import json
import os
import tarfile
import unicodedata
import zipfile

import pandas
import pytest

from tests.data_prep.annotations.prepared import metas, picture, prepare, put, rejected, write_json, write_lines

NAMES = ["a.jpg", "b.jpg", "sub dir/ü c.jpg"]
CAPTIONS = {
    "a.jpg": ["a red dog", "it runs, fast"],
    "b.jpg": ['a "blue" cat'],
    "sub dir/ü c.jpg": ["ein grünes Häuschen"],
}
ROWS = [(name, caption) for name in NAMES for caption in CAPTIONS[name]]


def photos(folder, names=NAMES):
    for number, name in enumerate(names):
        put(folder / name, picture(20 * number))
    return folder


def table(path, rows=ROWS, header=("file", "caption"), delimiter=",", encoding="utf-8"):
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=delimiter)
    writer.writerows([header, *rows] if header else rows)
    put(path, stream.getvalue().encode(encoding))
    return path


def local(tmp_path, *options, images=None, output="out"):
    return prepare("local", "--images", images or tmp_path / "photos", "--output", tmp_path / output, *options)


def prepared(corpus, *splits):
    """Path below the folder of images -> captions, of all splits."""
    found = {}
    for split in splits or sorted(path.name for path in corpus.iterdir() if path.is_dir()):
        found |= {meta["path"]: meta["captions"] for meta in metas(corpus / split)}
    return found


def write_parquet(path, rows):
    pandas.DataFrame(rows).to_parquet(path)
    return path


def objects(rows, image="file", caption="caption"):
    return [{image: name, caption: text} for name, text in rows]


FORMS = {
    "csv": lambda folder: table(folder / "c.csv"),
    "csv with semicolons": lambda folder: table(folder / "c.csv", delimiter=";"),
    "csv with bars": lambda folder: table(folder / "c.csv", header=("image_name", " comment"), delimiter="|"),
    "csv with tabs": lambda folder: table(folder / "c.csv", delimiter="\t"),
    "csv with a mark": lambda folder: table(folder / "c.csv", encoding="utf-8-sig"),
    "csv of utf-16": lambda folder: table(folder / "c.csv", encoding="utf-16"),
    "csv without header": lambda folder: table(folder / "c.csv", header=None),
    "txt of kaggle": lambda folder: table(folder / "captions.txt", header=("image", "caption")),
    "columns the other way": lambda folder: table(
        folder / "c.csv", [(text, 7, name) for name, text in ROWS], ("Description", "likes", "File Name")
    ),
    "tsv": lambda folder: table(folder / "c.tsv", delimiter="\t"),
    "jsonl": lambda folder: write_lines(folder / "c.jsonl", objects(ROWS)),
    "jsonl called json": lambda folder: write_lines(folder / "c.json", objects(ROWS, "img", "text")),
    "jsonl of lists": lambda folder: write_lines(folder / "c.jsonl", objects(CAPTIONS.items())),
    "list": lambda folder: write_json(folder / "c.json", objects(ROWS, "image_id", "sentence")),
    "list in an object": lambda folder: write_json(folder / "c.json", {"data": objects(ROWS)}),
    "mapping": lambda folder: write_json(folder / "c.json", CAPTIONS),
    "mapping to objects": lambda folder: write_json(
        folder / "c.json", {name: {"captions": texts, "width": 3} for name, texts in CAPTIONS.items()}
    ),
    "coco": lambda folder: write_json(
        folder / "c.json",
        {
            "images": [{"id": f"i{number}", "file_name": name} for number, name in enumerate(NAMES)],
            "annotations": [{"image_id": f"i{NAMES.index(name)}", "id": 0, "caption": text} for name, text in ROWS],
        },
    ),
    "parquet": lambda folder: write_parquet(folder / "c.parquet", objects(ROWS)),
    "parquet of lists": lambda folder: write_parquet(
        folder / "c.parquet", objects(CAPTIONS.items(), caption="captions")
    ),
    "list as json in a cell": lambda folder: table(
        folder / "c.csv", [(name, json.dumps(texts)) for name, texts in CAPTIONS.items()]
    ),
    "list as python prints it": lambda folder: table(
        folder / "c.csv", [(name, repr(texts)) for name, texts in CAPTIONS.items()]
    ),
    "numbered columns": lambda folder: table(
        folder / "c.csv",
        [(name, *texts, *[""] * (2 - len(texts))) for name, texts in CAPTIONS.items()],
        ("file", "caption_1", "caption_2"),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_corpus(form, tmp_path, capsys):
    photos(tmp_path / "photos")
    assert local(tmp_path, "--captions", FORMS[form](tmp_path)) == 0
    assert prepared(tmp_path / "out") == CAPTIONS
    said = capsys.readouterr().out
    assert said.startswith(f"captions: {tmp_path}") and "images: 3 of 3 have captions" in said


def test_captions_of_flickr8k_stand_in_the_order_of_their_numbers(tmp_path):
    photos(tmp_path / "photos", NAMES[:2])
    put(tmp_path / "x.token.txt", b"a.jpg#1\tit runs, fast\nb.jpg#0\ta cat\na.jpg#0\ta red dog\n")
    assert local(tmp_path, "--captions", tmp_path / "x.token.txt") == 0
    assert prepared(tmp_path / "out") == {"a.jpg": ["a red dog", "it runs, fast"], "b.jpg": ["a cat"]}


def test_texts_beside_the_images_hold_a_caption_in_each_line(tmp_path, capsys):
    photos(tmp_path / "photos")
    for name, texts in list(CAPTIONS.items())[:2]:
        put((tmp_path / "photos" / name).with_suffix(".txt"), ("\n\n".join(texts) + "\n").encode())
    put(tmp_path / "photos" / "sub dir" / "ü c.txt", CAPTIONS[NAMES[2]][0].encode("utf-16"))
    assert local(tmp_path) == 0
    assert prepared(tmp_path / "out") == CAPTIONS
    assert "NAME.txt beside each image" in capsys.readouterr().out


def test_metadata_of_an_imagefolder_is_found_with_its_splits(tmp_path):
    """As `load_dataset("imagefolder")` wants it: names are relative to the metadata file."""
    photos(tmp_path / "photos", [f"{split}/{number}.png" for split in ("train", "validation") for number in range(3)])
    for split in ("train", "validation"):
        rows = [(f"{number}.png", f"{split} {number}") for number in range(3)]
        table(tmp_path / "photos" / split / "metadata.csv", rows, ("file_name", "text"))
    assert local(tmp_path) == 0
    assert prepared(tmp_path / "out", "train") == {f"train/{number}.png": [f"train {number}"] for number in range(3)}
    dev = {f"validation/{number}.png": [f"validation {number}"] for number in range(3)}
    assert prepared(tmp_path / "out", "dev") == dev


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_images_in_an_archive(kind, tmp_path):
    photos(tmp_path / "photos")
    archive = tmp_path / f"photos.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as file:
            for name in NAMES:
                file.write(tmp_path / "photos" / name, name)
    else:
        with tarfile.open(archive, "w:gz") as file:
            file.add(tmp_path / "photos", "photos")
    assert local(tmp_path, "--captions", table(tmp_path / "c.csv"), images=archive) == 0
    above = "" if kind == "zip" else "photos/"
    assert prepared(tmp_path / "out") == {f"{above}{name}": texts for name, texts in CAPTIONS.items()}


def test_compressed_captions(tmp_path):
    photos(tmp_path / "photos")
    put(tmp_path / "c.csv.gz", gzip.compress(table(tmp_path / "c.csv").read_bytes(), mtime=0))
    assert local(tmp_path, "--captions", tmp_path / "c.csv.gz") == 0
    assert prepared(tmp_path / "out") == CAPTIONS


WRITTEN = {  # as a row writes it -> the file that is meant
    "dir/One.JPG": "dir/One.JPG",
    "dir\\One.JPG": "dir/One.JPG",
    "./dir/../dir/One.JPG": "dir/One.JPG",
    "DIR/one.jpg": "dir/One.JPG",
    "One": "dir/One.JPG",
    "one.jpg": "dir/One.JPG",
    "photos/dir/One.JPG": "dir/One.JPG",  # from where the table stands
    "C:\\Users\\me\\dir\\One.JPG": "dir/One.JPG",
    "/x/me/two.png": "two.png",
    unicodedata.normalize("NFD", "café.jpg"): "café.jpg",
    "two.jpeg": None,  # it is a PNG
    "other.jpeg": "other.jpg",
    "3": "3.gif",
    "../secret.jpg": None,
    "/etc/passwd": None,
    "link.jpg": None,
    "https://example.org/two.png": None,
    "tow.png": None,
    "same": None,  # same.jpg and same.png
    "same.png": "same.png",
}


@pytest.mark.parametrize("written", WRITTEN)
def test_an_image_is_found_however_it_is_written_but_never_outside(written, tmp_path, capsys):
    names = ["dir/One.JPG", "two.png", "café.jpg", "3.gif", "other.jpg", "same.jpg", "same.png"]
    photos(tmp_path / "photos", names)
    put(tmp_path / "secret.jpg", picture(77))
    os.symlink(tmp_path / "secret.jpg", tmp_path / "photos" / "link.jpg")
    rows = [(name, "fine") for name in ("other0.jpg", "other1.jpg")]
    photos(tmp_path / "photos", ["other0.jpg", "other1.jpg"])
    assert local(tmp_path, "--captions", table(tmp_path / "c.csv", [*rows, (written, "this one")])) == 0
    found = [name for name, texts in prepared(tmp_path / "out").items() if texts == ["this one"]]
    assert found == ([] if WRITTEN[written] is None else [WRITTEN[written]])
    if not found:
        assert "such as row 3: " in capsys.readouterr().out


def test_two_paths_of_another_machine_are_not_taken_for_one_image(tmp_path):
    photos(tmp_path / "photos", ["1.jpg", "2.jpg"])
    rows = [("/old/cats/1.jpg", "a cat"), ("/old/dogs/1.jpg", "a dog"), ("2.jpg", "two")]
    assert local(tmp_path, "--captions", table(tmp_path / "c.csv", rows)) == 0
    assert prepared(tmp_path / "out") == {"1.jpg": ["a cat"], "2.jpg": ["two"]}
    assert rejected(tmp_path / "out" / "train") == [("missing_image", "row 2: '/old/dogs/1.jpg'", 1)]


def test_what_is_refused_is_shown_by_its_row_with_the_fix(tmp_path, capsys):
    photos(tmp_path / "photos", ["dog.jpg", "cat.jpg", "bird.jpg"])
    put(tmp_path / "photos" / "broken.jpg", picture(5)[:200])
    put(tmp_path / "photos" / "phone.heic", b"\0\0\0\x24ftypheic" + b"\0" * 30)
    rows = [("dog.jpg", "a dog"), ("Dogg.jpg", "a dog"), ("cat.jpg", ""), ("bird.jpg", "a bird"), ("broken.jpg", "x")]
    rows += [("phone.heic", "y"), ("cat.jpg", "a cat")]
    assert local(tmp_path, "--captions", table(tmp_path / "c.csv", rows)) == 0
    out = capsys.readouterr().out
    assert "1 caption, missing_image, such as row 2: 'Dogg.jpg' is not below" in out and "nearest: 'dog.jpg'" in out
    assert "1 caption, empty_caption, such as row 3: 'cat.jpg'" in out
    assert "truncated_image, such as row 5: 'broken.jpg'" in out and "copy the file again" in out
    assert "not_an_image, such as row 6: 'phone.heic'" in out and "HEIC" in out


def test_latin_1_is_said(tmp_path, capsys):
    photos(tmp_path / "photos", ["a.jpg", "b.jpg"])
    put(tmp_path / "c.csv", "file,caption\na.jpg,ein Häuschen\nb.jpg,a house\n".encode("latin-1"))
    assert local(tmp_path, "--captions", tmp_path / "c.csv") == 0
    assert "invalid_utf8, such as row 1: 'a.jpg'" in (out := capsys.readouterr().out) and "iconv -f latin1" in out


def test_a_stray_quotation_mark_swallows_no_rows(tmp_path):
    photos(tmp_path / "photos")
    put(tmp_path / "c.csv", b'file,caption\nb.jpg,"two\nlines, really"\na.jpg,"a dog\nb.jpg,a cat\n')
    assert local(tmp_path, "--captions", tmp_path / "c.csv") == 0
    assert prepared(tmp_path / "out") == {"a.jpg": ["a dog"], "b.jpg": ["two lines, really", "a cat"]}


@pytest.mark.parametrize(
    "header, options, expected",
    [
        (("file", "path", "caption"), (), "file and path could both hold the image; found: file, path, caption"),
        (("file", "foo", "bar"), (), "no column is called as one that holds the caption; found: file, foo, bar"),
        (("file", "foo", "bar"), ("--columns", "file,text"), "no column text; found: file, foo, bar"),
        (("file", "foo", "bar"), ("--columns", "file"), "--columns file: one name, expected IMAGE,CAPTION"),
        (("x.jpg", "foo", "bar"), (), "no header line, and 2 cells besides the image"),
        (("file", "foo", "bar"), ("--dev-share", "0.6", "--test-share", "0.4"), "leave nothing to train on"),
    ],
)
def test_columns_that_are_not_clear_are_refused_with_the_header_and_the_option(
    header, options, expected, tmp_path, capsys
):
    photos(tmp_path / "photos")
    captions = table(tmp_path / "c.csv", [("a.jpg", "b.jpg", "a dog")], header)
    assert local(tmp_path, "--captions", captions, *options) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1 and "--" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("c.csv", b"", "is empty, expected captions"),
        ("c.parquet", b"\x93" * 900, "cannot be read as parquet"),
        ("c.json", b'{"a": ', "not readable as JSON"),
        ("c.json", '{"a.jpg": "caf\u00e9"}'.encode("latin-1"), "save it again as UTF-8"),
        ("c.json", b"[" * 100_000, "not readable as JSON"),
        ("c.json", b"[1, 2]", "a list without objects, expected a list of objects"),
        ("c.jsonl", b"\x93\n" * 90, "no column is called as one that holds the image; found: none"),
        ("c.csv.gz", gzip.compress(b"file,caption\n" * 99, mtime=0)[:40], "cannot be read"),
        ("c.csv", b"file,caption\nhttps://h/1.jpg,a dog\n", "`python -m data_prep urls` downloads addresses"),
        ("c.csv", b"file,caption\n", "(3) the rows? it holds no row"),
    ],
)
def test_a_file_that_is_none_of_captions_is_refused_in_one_line(name, content, expected, tmp_path, capsys):
    photos(tmp_path / "photos")
    put(tmp_path / name, content)
    assert local(tmp_path, "--captions", tmp_path / name) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1 and str(tmp_path / name) in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("columns", ["file,foo", "1,2"])
def test_columns_are_those_that_are_named(columns, tmp_path):
    photos(tmp_path / "photos", ["a.jpg", "b.jpg"])
    header = None if columns == "1,2" else ("file", "foo", "caption")
    rows = [("a.jpg", "a dog", "wrong"), ("b.jpg", "a cat", "wrong")]
    assert local(tmp_path, "--captions", table(tmp_path / "c.csv", rows, header), "--columns", columns) == 0
    assert prepared(tmp_path / "out") == {"a.jpg": ["a dog"], "b.jpg": ["a cat"]}


def test_where_nothing_is_usable_one_line_names_the_likeliest_mistakes(tmp_path, capsys):
    photos(tmp_path / "photos")
    captions = table(tmp_path / "c.csv", [("dog1", "a dog"), ("dog2", "two dogs")], ("id", "text"))
    assert local(tmp_path, "--captions", captions) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "(1) the folder?" in error and "holds 3 images such as 'a.jpg'" in error
    assert f"(2) the columns? {captions}: image from 'id', caption from 'text' of id, text" in error
    assert "(3) the rows? 2 captions, missing_image, such as row 1: 'dog1'" in error


def test_where_no_picture_can_be_read_nothing_is_left(tmp_path, capsys):
    put(tmp_path / "photos" / "1.heic", b"\0\0\0\x24ftypheic" + b"\0" * 30)
    assert local(tmp_path, "--captions", table(tmp_path / "c.csv", [("1.heic", "a dog")])) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'out' / 'train'}: no usable record (1 not_an_image, such as 1 (starts with" in error
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_images_inside_parquet_and_folders_without_captions_name_the_way_out(tmp_path, capsys):
    photos(tmp_path / "photos")
    inside = write_parquet(tmp_path / "c.parquet", [{"image": {"bytes": picture(1), "path": "a"}, "caption": "a"}])
    assert local(tmp_path, "--captions", inside) == 2
    assert "python -m data_prep parquet --input" in capsys.readouterr().err
    assert local(tmp_path) == 2
    assert "name the file of captions by --captions" in capsys.readouterr().err
    assert local(tmp_path, "--captions", tmp_path / "none.csv") == 2
    assert local(tmp_path, images=tmp_path / "nowhere") == 2
