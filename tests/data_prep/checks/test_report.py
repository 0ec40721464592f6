"""The page of prepared data: it loads nothing, escapes what it shows, and says what the files hold."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from data_prep.__main__ import main
from data_prep.manifest import load_manifest, write_manifest
from data_prep.record import Record, Rejection
from data_prep.reporting.charts import histogram, stacked_bar
from data_prep.reporting.contact_sheet import contact_sheet, repeated_images
from tests.data_prep.checks.splits import jpeg, records, write_split, write_unchecked
from tests.pipeline.reporting.markup import Markup


class Page(HTMLParser):
    """The visible text, the tags, and what could load something."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.links, self.tags, self.alts, self.open = "", [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href", "data")]
        self.alts += [dict(attributes).get("alt") for _ in range(tag == "img")]
        if tag not in ("meta", "img", "rect", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in ("rect", "img"):
            return
        assert self.open.pop() == tag, "tags close in the order in which they open"

    def handle_data(self, data):
        self.text += data


def report(folder, *arguments):
    assert main(["report", str(folder), "--workers", "1", *map(str, arguments)]) == 0
    return (folder / "report.html").read_text()


def test_the_page_shows_everything_and_loads_nothing(tmp_path):
    evil = "<script>alert('x')</script> & \"quotes\""
    items = [*records(), Record("k9", (jpeg(90),), (evil,), {"url": f"http://host0.org/{evil}"})]
    items += [Rejection("timeout", f"row 70: http://{'a' * 40}.org/{evil}"), Record("tiny", (jpeg(1, (4, 4)),), ("t",))]
    write_split(tmp_path / "c" / "train", items)
    write_split(tmp_path / "c" / "dev", records(2))
    html = report(tmp_path / "c", "--samples", 50)
    page = Page(html)
    assert all(link.startswith(("data:image/jpeg;base64,", "#split")) for link in page.links)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert "@import" not in html and "url(" not in html and page.open == []
    for words in ("c/train", "c/dev", "http_404", "image_too_small", "the server answered with status", evil):
        assert words in page.text, words
    assert "76.5%" in page.text and "of 17 rows read were written" in page.text
    assert page.tags.count("svg") == html.count('<svg role="img" aria-label="') == 2 * 5
    assert page.tags.count("img") == 7 + 2 and None not in page.alts and "" not in page.alts
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html and '<html lang="en">' in html
    assert Markup(html).faults == []
    assert html == report(tmp_path / "c", "--samples", 50), "equal splits give equal bytes"


def test_the_sheet_is_drawn_by_the_seed_and_shows_the_images(tmp_path):
    manifest = write_split(tmp_path / "c" / "train", records(20))
    sheets = [contact_sheet(tmp_path / "c" / "train", manifest, 5, seed) for seed in (0, 0, 1)]
    assert sheets[0] == sheets[1] != sheets[2] and len(sheets[0]) == 5
    for shown in sheets[0]:
        number = int(shown.captions[0].split()[-1])
        with Image.open(io.BytesIO(base64.b64decode(shown.images[0].split(",")[1]))) as image:
            assert image.size == (24, 24) and abs(image.convert("L").getpixel((12, 12)) - 10 * number % 256) < 6
    assert len(contact_sheet(tmp_path / "c" / "train", manifest, 99, 0)) == 20


def test_images_that_come_often_are_shown(tmp_path):
    grey, other = jpeg(3), jpeg(200)
    images = [grey, jpeg(9), grey, other, grey, other, jpeg(77)]
    kept = [Record(f"k{i}", (image,), (f"text {i}",), {}, ("jpg",)) for i, image in enumerate(images)]
    manifest = write_unchecked(tmp_path / "c" / "train", kept)
    found = repeated_images(tmp_path / "c" / "train", manifest, 1, 8)
    assert [(one.count, one.picture.captions) for one in found] == [(3, ("text 0",)), (2, ("text 3",))]
    assert "in 3 samples" in Page(report(tmp_path / "c", "--repeated")).text


def test_an_older_split_without_a_passport_is_counted_from_its_files(tmp_path):
    manifest = write_split(tmp_path / "c" / "train")
    whole = report(tmp_path / "c")
    del manifest.provenance["passport"]
    write_manifest(tmp_path / "c" / "train", manifest)
    assert "passport" not in load_manifest(tmp_path / "c" / "train").provenance
    assert report(tmp_path / "c") == whole


@pytest.mark.parametrize("passport", [{}, {"rows": 5}, [], {"rows": {"read": "x"}}])
def test_a_passport_that_is_none_is_one_line(tmp_path, passport, capsys):
    manifest = write_split(tmp_path / "c" / "train")
    manifest.provenance["passport"] = passport or {"x": 1}
    write_manifest(tmp_path / "c" / "train", manifest)
    assert main(["report", str(tmp_path / "c"), "--workers", "1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["info", str(tmp_path / "c")]) == 0
    assert "passport of c/train: can't be read" in capsys.readouterr().out


def test_undecodable_images_and_damaged_shards(tmp_path, capsys):
    bad = Record("bad", (b"no image",), ("what it says",), {}, ("jpg",))
    write_unchecked(tmp_path / "c" / "train", [bad])
    assert "can't be decoded" in Page(report(tmp_path / "c")).text
    tar = tmp_path / "c" / "train" / "00000.tar"
    content = bytearray(tar.read_bytes())
    place = content.index(b'{"captions"')
    content[place : place + 5] = b"xxxxx"
    tar.write_bytes(content)
    assert main(["report", str(tmp_path / "c"), "--workers", "1"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "doctor --decode" in error


def test_output_must_be_a_file_in_a_folder(tmp_path, capsys):
    write_split(tmp_path / "c" / "train")
    for output in (tmp_path, tmp_path / "no" / "page.html"):
        assert main(["report", str(tmp_path / "c"), "--output", str(output)]) == 2
        assert "expected a file in a folder that is there" in capsys.readouterr().err


def test_bars_are_in_proportion():
    drawn = str(histogram("x", ["1", "2", "3"], [10, 0, 5]))
    heights = [float(height) for height in re.findall(r'<rect [^>]*height="([\d.]+)"', drawn)]
    assert heights[0] == 2 * heights[2] > heights[1] == 0
    widths = [
        float(width) for width in re.findall(r'width="([\d.]+)" height="26"', str(stacked_bar("x", "abc", [1, 0, 3])))
    ]
    assert widths[2] == pytest.approx(3 * widths[0]) and widths[1] == 0
    assert 'aria-label="x: 1 10, 3 5"' in drawn
    assert "<svg" in str(histogram("x", [], [])) and json.dumps(str(stacked_bar("x", "a", [0])))
