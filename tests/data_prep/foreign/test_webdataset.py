"""Shards of other programs are taken in as they lie, or copied, and read as webdataset reads them."""

import errno
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_prep.__main__ import main
from data_prep.checks.info import describe_split, row_texts
from data_prep.checks.verify import verify_split
from data_prep.filters import Limits
from data_prep.manifest import ManifestError, find_manifests, read_manifest
from pipeline.data.shard_reader import Corpus
from tests.data_prep.foreign.shards import picture, triples, write_tar
from tests.data_prep.foreign.taking_in import in_both_ways, rejected, rows, take_in


def test_cc3m_shards_in_place_are_what_webdataset_reads(tmp_path):
    """Findings E1, C18: names as in cc3m-wds, on the same disk: nothing is copied, nothing in them changed."""
    source = tmp_path / "cc3m"
    for shard in range(3):
        write_tar(source / f"cc3m-train-{shard:04d}.tar", triples(range(10 * shard, 10 * shard + 4)))
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    found = in_both_ways(source, tmp_path)
    urls = sorted(str(path) for path in source.iterdir())
    read = webdataset.WebDataset(urls, shardshuffle=False)
    expected = [
        (f"train_{os.path.basename(one['__url__'])[:-4]}_{one['__key__']}", one["jpg"], one["txt"].decode())
        for one in read
    ]
    assert found == expected and len(found) == 12
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    for path in source.iterdir():
        assert os.path.samefile(path, tmp_path / "linked" / "train" / path.name)
    corpus = Corpus(tmp_path / "linked" / "train")
    assert corpus.read(5).meta["url"] == "http://x/11"
    assert list(row_texts(tmp_path / "linked" / "train", corpus.manifest)) == [caption for _, _, caption in expected]
    assert describe_split(tmp_path / "linked" / "train")["image_pixels"] == {"32x24": 4}


def test_the_message_about_foreign_shards_names_the_command_that_takes_them_in(tmp_path, capsys):
    """Finding E1: what the message says works as it stands."""
    write_tar(tmp_path / "data" / "cc3m" / "train" / "00000.tar", triples(range(3)))
    with pytest.raises(ManifestError, match="data_prep webdataset") as caught:
        find_manifests(tmp_path / "data" / "cc3m", "train")
    assert "remove" not in str(caught.value)
    command = str(caught.value).split("`python -m data_prep ")[1].split("`")[0]
    command = command.replace("data/NAME", str(tmp_path / "data" / "new"))
    assert main(command.split()) == 0
    assert len(Corpus(tmp_path / "data" / "new" / "train")) == 3


def test_shards_of_img2dataset_with_their_tables_and_statistics(tmp_path):
    """A failed download stands in no tar; its count is kept. Keys begin anew in each shard here."""
    for shard in range(2):
        write_tar(tmp_path / "in" / f"{shard:05d}.tar", triples(range(3), status="success", exif="{}"))
        (tmp_path / "in" / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        stats = {
            "count": 5,
            "successes": 3,
            "failed_to_download": 2,
            "status_dict": {"success": 3, "HTTP Error 404": 2},
        }
        (tmp_path / "in" / f"{shard:05d}_stats.json").write_text(json.dumps(stats))
    found = in_both_ways(tmp_path / "in", tmp_path)
    keys = [key for key, _, _ in found]
    assert len(set(keys)) == 6 and keys[3] == "train_00001_000000000"
    provenance = read_manifest(tmp_path / "linked" / "train").provenance["arguments"]
    assert provenance["downloads"] == {"urls": 10, "downloaded": 6, "failures": {"HTTP Error 404": 4}}


def test_shards_of_webdatasets_own_writer(tmp_path):
    (tmp_path / "in").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "in" / "s-%06d.tar"), maxcount=2, verbose=0) as writer:
        for number in range(5):
            writer.write(
                {"__key__": f"k{number}", "png": picture(number, "PNG"), "txt": f"text {number}", "cls": number}
            )
    found = in_both_ways(tmp_path / "in", tmp_path)
    assert [(key, caption) for key, _, caption in found] == [
        (f"train_s-00000{number // 2}_k{number}", f"text {number}") for number in range(5)
    ]


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_names_as_others_choose_them(tmp_path, tar_format):
    """Folders, dots in folders, upper case, several suffixes, members in any order, other members between."""
    members = [
        ("v1.0/images/0001.JPG", picture(1)),
        ("v1.0/images/0001.TXT", b" One\n caption\n"),
        ("0002.image.jpeg", picture(2)),
        ("0002.caption.txt", "zwei Größen".encode()),
        ("0002.cls", b"7"),
        ("0003.json", b'{"caption": "three", "score": NaN}'),
        ("0003.webp", picture(3, "WEBP")),
        ("0004.caption", b"\xef\xbb\xbffour"),
        ("0004.png", picture(4, "PNG")),
        ("0004.json", b"{broken"),
        ("0005.txt", b"five"),
    ]
    members += [("0006.jpg", picture(6)), ("0005.jpg", picture(5)), ("0006.txt", b"six")]
    write_tar(tmp_path / "in" / "a.b.tar", members, tar_format)
    found = in_both_ways(tmp_path / "in", tmp_path)
    assert [caption for _, _, caption in found] == ["One caption", "zwei Größen", "three", "four", "five", "six"]
    assert [key for key, _, _ in found][:2] == ["train_a_b_v1_0_images_0001", "train_a_b_0002"]
    numbers = (1, 2, 3, 4, 5, 6)
    assert [image for _, image, _ in found] == [
        picture(number, {3: "WEBP", 4: "PNG"}.get(number, "JPEG")) for number in numbers
    ]
    meta = Corpus(tmp_path / "copied" / "train").read(2).meta
    assert meta == {"caption": "three", "score": None, "captions": ["three"]}


def test_lists_of_captions_are_rows_of_one_image(tmp_path):
    """Numbers count the list as it stands; what can't be used of it is counted, also the first."""
    content = {"texts": ["", " a  cat ", 7, "a dog"], "captions": "of something else"}
    members = [("1.jpg", picture(1)), ("1.json", json.dumps(content).encode()), ("1.txt", b"alt text")]
    write_tar(tmp_path / "in" / "0.tar", [*members, *triples(range(2, 4))])
    found = in_both_ways(tmp_path / "in", tmp_path, "--caption-key", "texts")
    assert [caption for _, _, caption in found] == ["a cat", "a dog", "caption 2", "caption 3"]
    assert rejected(tmp_path / "linked" / "train") == {"empty_caption": 1, "malformed_row": 1}
    for name in ("linked", "copied"):
        corpus = Corpus(tmp_path / name / "train")
        assert corpus.first_rows().tolist() == [0, 2, 3] and corpus.manifest.samples == 3


def test_several_images_are_chosen_by_name(tmp_path):
    members = []
    for number in range(2):
        members += [(f"{number}.0.png", picture(number, "PNG")), (f"{number}.1.jpg", picture(9 + number))]
        members += [(f"{number}.thumb.jpg", picture(77)), (f"{number}.txt", b"two images")]
    write_tar(tmp_path / "in" / "0.tar", members)
    assert take_in(tmp_path / "in", tmp_path / "none") == 2
    for name, options in (("linked", ()), ("copied", ("--copy",))):
        assert take_in(tmp_path / "in", tmp_path / name, "--image-members", "0,1.jpg", *options) == 0
        corpus = Corpus(tmp_path / name / "train")
        assert corpus.num_images == 2 and corpus.read(1).images == [picture(1, "PNG"), picture(10)]
        assert verify_split(tmp_path / name / "train", Limits(), 1).problems == []


def test_every_sample_that_is_not_taken_is_counted_and_named(tmp_path):
    members = [
        *triples(range(2)),
        ("no_text.jpg", picture(1)),
        ("no_image.txt", b"x"),
        ("v1.2.jpg", picture(2)),
        ("v1.3.jpg", picture(3)),
        ("two.a.txt", b"x"),
        ("two.b.txt", b"x"),
        ("two.jpg", picture(4)),
        ("html.jpg", b"<html>"),
        ("html.txt", b"x"),
        ("empty.jpg", b""),
        ("empty.txt", b"x"),
        ("small.jpg", picture(5, size=(8, 8))),
        ("small.txt", b"x"),
        ("latin.jpg", picture(6)),
        ("latin.txt", b"caf\xe9"),
        ("half.jpg", picture(6)),
        ("half.json", b'{"caption": "\\ud800"}'),
        ("README", b"about"),
        ("._000000000.jpg", b"\0\5\x16\7"),
        ("000000001.jpg", picture(8)),
    ]
    write_tar(tmp_path / "in" / "0.tar", members)
    assert len(in_both_ways(tmp_path / "in", tmp_path)) == 2
    assert rejected(tmp_path / "linked" / "train") == {
        "empty_caption": 1,
        "no_image_in_sample": 1,
        "ambiguous_sample": 2,
        "not_an_image": 1,
        "empty_image": 1,
        "image_too_small": 1,
        "invalid_utf8": 2,
        "no_key": 2,
        "duplicate_key": 1,
    }
    lines = (tmp_path / "linked" / "train" / "rejected.jsonl").read_text().splitlines()
    named = {line["name"]: line for line in map(json.loads, lines)}
    assert "first dot" in named["0.tar: v1"]["detail"] and "2.jpg, 3.jpg" in named["0.tar: v1"]["detail"]


def test_a_link_that_another_file_system_refuses(tmp_path, monkeypatch, capsys):
    write_tar(tmp_path / "in" / "0.tar", triples([1]))

    def refuse(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    assert take_in(tmp_path / "in", tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert "cross-device" in message and "--copy" in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert take_in(tmp_path / "in", tmp_path / "out", "--copy") == 0


def test_links_of_a_hub_cache_are_followed(tmp_path):
    blob = write_tar(tmp_path / "blobs" / "abc", triples(range(2)))
    (tmp_path / "snapshots" / "1").mkdir(parents=True)
    (tmp_path / "snapshots" / "1" / "0.tar").symlink_to("../../blobs/abc")
    assert take_in(tmp_path / "snapshots" / "1", tmp_path / "out") == 0
    taken = tmp_path / "out" / "train" / "0.tar"
    assert not taken.is_symlink() and os.path.samefile(taken, blob) and len(rows(taken.parent)) == 2


def test_shards_of_the_same_name_in_two_folders(tmp_path):
    for number, folder in enumerate("ab"):
        write_tar(tmp_path / "in" / folder / "00000.tar", triples([number]))
    found = in_both_ways(tmp_path / "in", tmp_path)
    assert [(key, caption) for key, _, caption in found] == [
        ("train_a_00000_000000000", "caption 0"),
        ("train_b_00000_000000001", "caption 1"),
    ]
    inputs = [str(tmp_path / "in"), str(tmp_path / "in" / "a")]
    assert main(["webdataset", "--input", *inputs, "--output", str(tmp_path / "twice")]) == 2


def test_a_split_of_ours_needs_no_taking_in(tmp_path, capsys):
    write_tar(tmp_path / "in" / "0.tar", triples([1]))
    assert take_in(tmp_path / "in", tmp_path / "out") == 0
    assert take_in(tmp_path / "out", tmp_path / "again") == 2
    assert "prepared split already" in capsys.readouterr().err


def test_an_interruption_leaves_nothing_and_the_old_split_in_place(tmp_path, monkeypatch):
    """Invariant 6."""
    write_tar(tmp_path / "in" / "0.tar", triples([1]))
    assert take_in(tmp_path / "in", tmp_path / "out") == 0
    assert take_in(tmp_path / "in", tmp_path / "out") == 2  # there already
    before = {path.name: path.read_bytes() for path in (tmp_path / "out" / "train").iterdir()}

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.foreign.linked.file_sha256", interrupted)
        assert take_in(tmp_path / "in", tmp_path / "out", "--overwrite") == 130
    assert {path.name: path.read_bytes() for path in (tmp_path / "out" / "train").iterdir()} == before
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")] == []
    write_tar(tmp_path / "in" / "1.tar", triples([2]))
    assert take_in(tmp_path / "in", tmp_path / "out", "--overwrite") == 0
    assert len(rows(tmp_path / "out" / "train")) == 2


@pytest.mark.slow(5)
def test_workers_change_nothing(tmp_path):
    for shard in range(5):
        write_tar(tmp_path / "in" / f"{shard}.tar", [*triples(range(shard, shard + 3)), ("bad.jpg", b"x")])
    assert take_in(tmp_path / "in", tmp_path / "one" / "c") == 0
    arguments = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "two" / "c"), "--workers", "2"]
    assert main(["webdataset", *arguments]) == 0
    one, two = (tmp_path / name / "c" / "train" for name in ("one", "two"))
    assert {path.name: path.read_bytes() for path in one.iterdir()} == {p.name: p.read_bytes() for p in two.iterdir()}


def test_the_manifest_says_whose_shards_they_are(tmp_path):
    write_tar(tmp_path / "in" / "0.tar", triples([1]))
    assert take_in(tmp_path / "in", tmp_path / "out", "--caption-key", "text") == 0
    path = tmp_path / "out" / "train" / "manifest.json"
    content = json.loads(path.read_text())
    assert content["caption_key"] == "text"
    before = read_manifest(path.parent).fingerprint()
    path.write_text(json.dumps({**content, "caption_key": "caption"}))
    assert read_manifest(path.parent).fingerprint() != before
    path.write_text(json.dumps({**content, "caption_key": 7}))
    with pytest.raises(ManifestError, match="caption_key"):
        read_manifest(path.parent)


def test_pixels_in_place_are_those_of_the_tar(tmp_path):
    write_tar(tmp_path / "in" / "0.tar", triples(range(4)))
    assert take_in(tmp_path / "in", tmp_path / "out") == 0
    decoded = [np.asarray(Image.open(io.BytesIO(image))) for _, image, _ in rows(tmp_path / "out" / "train")]
    read = webdataset.WebDataset(str(tmp_path / "in" / "0.tar"), shardshuffle=False).decode("rgb8")
    assert all(np.array_equal(ours, theirs["jpg"]) for ours, theirs in zip(decoded, read, strict=True))


@pytest.mark.slow(20)
def test_what_img2dataset_itself_writes(tmp_path):
    """Finding E1 with the program: resized images, its JSON, tables, statistics, and a download that failed."""
    folder = tmp_path / "www"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.jpg").write_bytes(picture(number, size=(300, 280)))
    lines = ["url\tcaption", *(f"http://127.0.0.1:PORT/{number}.jpg\tpicture {number}" for number in range(6))]
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        (tmp_path / "urls.tsv").write_text("\n".join(lines).replace("PORT", str(server.server_port)))
        options = {"url_list": str(tmp_path / "urls.tsv"), "input_format": "tsv", "caption_col": "caption"}
        options |= {"output_folder": str(tmp_path / "in"), "output_format": "webdataset", "number_sample_per_shard": 3}
        options |= {"processes_count": 1, "thread_count": 2, "image_size": 64}
        program = f"import img2dataset; img2dataset.download(**{options!r})"
        ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
        server.shutdown()
    assert ended.returncode == 0, ended.stderr
    found = in_both_ways(tmp_path / "in", tmp_path)
    assert sorted(caption for _, _, caption in found) == [f"picture {number}" for number in range(5)]
    assert {Image.open(io.BytesIO(image)).size for _, image, _ in found} == {(64, 64)}
    corpus = Corpus(tmp_path / "linked" / "train")
    assert corpus.read(0).meta["original_width"] == 300
    downloads = corpus.manifest.provenance["arguments"]["downloads"]
    assert (downloads["urls"], downloads["downloaded"]) == (6, 5)
    assert any("404" in message for message in downloads["failures"])


def test_keys_differ_between_splits(tmp_path):
    """Finding E7: shards of several splits are called alike, and number their samples from 0."""
    keys = []
    for split in ("train", "dev"):
        write_tar(tmp_path / split / "00000.tar", triples(range(3)))
        for name, options in (("linked", ()), ("copied", ("--copy",))):
            assert take_in(tmp_path / split, tmp_path / name, "--split", split, *options) == 0
        keys += [key for key, _, _ in rows(tmp_path / "linked" / split)]
        with tarfile.open(tmp_path / "copied" / split / "00000.tar") as tar:
            assert {member.name.partition(".")[0] for member in tar} == set(keys[-3:])
    assert len(set(keys)) == 6


def test_the_doctor_names_what_is_wrong_with_shards_of_others_and_leaves_them(tmp_path, capsys):
    """An index made again by the rule of our own shards would take in what had been rejected."""
    write_tar(tmp_path / "theirs" / "a.tar", triples(range(3)))
    assert take_in(tmp_path / "theirs", tmp_path / "linked") == 0
    split_dir = tmp_path / "linked" / "train"
    [index] = split_dir.glob("*.npy")
    index.unlink()
    before = {path.name: path.read_bytes() for path in split_dir.iterdir()}
    assert main(["doctor", str(split_dir), "--repair", "--workers", "1", "--min-age", "0"]) == 1
    said = capsys.readouterr().out
    assert "missing_index" in said and "left as they are" in said and "webdataset` with --overwrite" in said
    assert {path.name: path.read_bytes() for path in split_dir.iterdir()} == before
