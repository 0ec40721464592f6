"""--dry-run says what would be done, and writes nothing; help and errors say where the files come from."""

import json

import pytest

from data_prep.__main__ import build_parser, main
from data_prep.filters import Limits, check_image
from data_prep.options import dry_run
from data_prep.record import Rejection, UrlRow
from data_prep.sources.expectations import REPORTED_YIELDS, expected_bytes, expected_time, in_words
from data_prep.sources.origins import ORIGINS
from data_prep.verbs.table import VERBS
from tests.data_prep.annotations import test_nlvr2, test_snli_ve
from tests.data_prep.annotations.prepared import picture, put, write_lines

PLANNED = ("urls", "cc3m", "cc12m", "sbu", "laion", "coco", "vg", "flickr8k", "flickr30k", "nocaps", "vqav2", "gqa")
PLANNED += (
    "okvqa",
    "nlvr2",
    "snli_ve",
    "easy_vqa",
    "easy_pairs",
    "msrvtt",
    "msvd",
)  # webvid reads its clips row by row


def everything(folder):
    return sorted(path for path in folder.rglob("*"))


def test_a_download_is_planned(tmp_path, capsys):
    path = tmp_path / "cc12m.tsv"
    path.write_text(
        "".join(f"http://{'a' if n % 3 else 'b'}.org/{n}\ta dog {n}\n" for n in range(3600)) + "http://h/x\t\n"
    )
    before = everything(tmp_path)
    command = ["cc12m", "--input", str(path), "--output", str(tmp_path / "out"), "--dry-run", "--image-size", "256"]
    assert main([*command, "--images-per-second", "10"]) == 0
    printed = capsys.readouterr().out
    for expected in (
        "cc12m train: 3,601 rows (published: 12,423,374, 12,419,773 fewer)",
        "usable: 3,600 images with 3,600 captions; unusable rows: 1 empty_caption",
        "yield reported: 62.3% (2025-10; github.com/google-research-datasets/conceptual-12m/issues/9)",
        f"images expected: {3600 * 7_740_121 / 12_423_374:,.0f} (the latest of these; an expectation, links rot)",
        "at --image-size 256 (0.39 bytes a pixel, measured on photographs)",
        "time: 6.0 min at 10 downloads/s (--images-per-second)",
        "hosts: 2; most often a.org 2,400, b.org 1,200",
        "nothing was written",
    ):
        assert expected in printed
    assert everything(tmp_path) == before


def test_an_annotated_set_is_planned(tmp_path, capsys):
    path = write_lines(tmp_path / "dev.json", [test_nlvr2.row(f"dev-{n}-0-{k}") for n in range(3) for k in range(2)])
    for number in range(2):
        test_nlvr2.pair_images(tmp_path / "in", f"dev-{number}-0")
    before = everything(tmp_path)
    command = ["nlvr2", "--input", str(path), "--output", str(tmp_path / "out"), "--dry-run"]
    assert main([*command, "--images", str(tmp_path / "in")]) == 0
    printed = capsys.readouterr().out
    assert "2 samples with 4 texts; unusable rows: 2 missing_image" in printed and "their bytes as they are" in printed
    assert main([*command, "--images", str(tmp_path / "in"), "--image-size", "224"]) == 0
    assert "at --image-size 224" in capsys.readouterr().out
    assert main(command) == 0
    assert "3 samples with 6 texts" in (printed := capsys.readouterr().out) and "none was looked for" in printed
    assert everything(tmp_path) == before


def test_flickr8k_and_urls_are_planned(tmp_path, capsys):
    put(tmp_path / "in" / "captions.txt", b"image,caption\n1.jpg,a dog\n1.jpg,a cat\n2.jpg,a cow\n")
    put(tmp_path / "in" / "Images" / "1.jpg", picture(1))
    put(
        tmp_path / "t.jsonl",
        b'{"url": "http://h/1", "caption": ["x", "y"]}\n{"url": "http://[::1", "caption": "z"}\n[]\n',
    )
    before = everything(tmp_path)
    output = ["--output", str(tmp_path / "out"), "--dry-run"]
    assert main(["flickr8k", "--input", str(tmp_path / "in"), "--dev-share", "0", *output]) == 0
    assert "1 samples with 2 texts; unusable rows: 1 missing_image" in capsys.readouterr().out
    assert main(["urls", "--input", str(tmp_path / "t.jsonl"), *output]) == 0
    printed = capsys.readouterr().out
    assert "2 images with 3 captions; unusable rows: 1 malformed_row" in printed and "no yield is known" in printed
    assert "hosts: 2; most often h 1, unreadable 1" in printed and "--image-size N bounds it" in printed
    assert everything(tmp_path) == before


def test_what_is_written_when_there_is_a_plan_is_said(tmp_path, capsys):
    row = test_snli_ve.row("47", 0)
    path = write_lines(tmp_path / "snli_ve_dev.jsonl", [row])
    put(tmp_path / "out" / "dev" / "x", b"")
    assert main(["snli_ve", "--input", str(path), "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    assert "is there already, --overwrite would replace it; nothing was written" in capsys.readouterr().out


def test_hosts_are_counted_in_bounded_memory(monkeypatch):
    monkeypatch.setattr(dry_run, "_MAX_HOSTS", 100)
    urls = [f"http://{'many' if n % 2 else n}.org/{n}" for n in range(5000)]
    counted = dry_run.Counted(
        [*(UrlRow(n, url, ("a", "b"), {}) for n, url in enumerate(urls)), Rejection("x", "y", rows=3)]
    )
    assert sum(1 for _ in counted) == 5001 and (counted.rows, counted.images) == (10003, 5000)
    assert len(counted.hosts) <= 100 and counted.hosts.most_common(1) == [("many.org", 2500)]


@pytest.mark.parametrize("verb", PLANNED)
def test_every_verb_that_downloads_or_prepares_published_files_can_be_planned(verb):
    options = build_parser()._subparsers._group_actions[0].choices[verb]._option_string_actions
    assert verb in VERBS and {"--dry-run", "--images-per-second"} <= set(options)


@pytest.mark.parametrize("verb", ORIGINS)
def test_help_says_what_to_download_and_where(verb, capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args([verb, "--help"])
    said = " ".join(capsys.readouterr().out.replace("-\n", "-").split())
    assert "yours to fetch" in said and ORIGINS[verb].page.split(" ")[0] in said
    assert {"cc3m", "cc12m", "sbu", "laion", "coco", "vg", "flickr30k", "flickr8k", "vqav2", "nlvr2", "snli_ve"} <= set(
        ORIGINS
    )


def test_expected_disk_is_above_what_images_have():
    """The rule against images that --image-size makes: noise, which compresses worse than photographs, is above it."""
    stored, _ = check_image(picture(3), Limits(image_size=16, min_side=1))
    assert len(stored) < expected_bytes(1, 16) + 1000
    assert expected_bytes(10, 256) == 10 * expected_bytes(1, 256) and expected_bytes(1, 512) > 3.5 * expected_bytes(
        1, 256
    )
    assert [in_words(n) for n in (1.5e12, 12e9, 3e8, 2e4)] == ["1.5 TB", "12 GB", "300 MB", "20 kB"]
    assert [expected_time(n, 2) for n in (7, 7200, 72000)] == ["4 s", "1.0 h", "10.0 h"]
    assert all(0 < one.share <= 1 and one.when and one.source for found in REPORTED_YIELDS.values() for one in found)
    assert json.dumps(REPORTED_YIELDS)
