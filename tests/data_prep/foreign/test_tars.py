"""Tars as they come: PAX and GNU blocks, links, sparse members, compressed, cut, joined, with odd names."""

import io
import json
import os
import tarfile

import pytest

from data_prep.checks.verify import verify_split
from data_prep.filters import Limits
from data_prep.foreign.tar_samples import read_tar
from tests.data_prep.foreign.shards import picture, triples, write_tar
from tests.data_prep.foreign.taking_in import in_both_ways, rejected, rows, take_in


def test_what_only_a_copy_can_take_in(tmp_path, capsys):
    """Images to be converted; names longer than a header, which then follow another."""
    write_tar(tmp_path / "in" / "0.tar", [("g.gif", picture(1, "GIF")), ("g.txt", b"x"), *triples([2])])
    assert take_in(tmp_path / "in", tmp_path / "linked") == 0
    assert rejected(tmp_path / "linked" / "train") == {"needs_conversion": 1}
    assert take_in(tmp_path / "in", tmp_path / "copied", "--copy") == 0
    assert [image[:2] for _, image, _ in rows(tmp_path / "copied" / "train")] == [b"\xff\xd8"] * 2
    for number, tar_format in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        write_tar(tmp_path / f"long{number}" / "0.tar", triples([3], "folder/" * 20), tar_format)
        assert take_in(tmp_path / f"long{number}", tmp_path / f"l{number}") == 2
        assert "longer than a tar header holds" in capsys.readouterr().err
        assert not (tmp_path / f"l{number}" / "train").exists()
        assert take_in(tmp_path / f"long{number}", tmp_path / f"c{number}", "--copy") == 0
        assert [caption for _, _, caption in rows(tmp_path / f"c{number}" / "train")] == ["caption 3"]
    assert take_in(tmp_path / "in", tmp_path / "size", "--image-size", "64") == 2
    assert "--copy" in capsys.readouterr().err


def test_pax_blocks_before_members_shift_nothing(tmp_path):
    """Trap: readers that count headers of 512 bytes are led astray by PAX records, as Python writes for odd times."""
    infos = []
    for name, content in triples(range(3)):
        info = tarfile.TarInfo(name)
        info.mtime, info.pax_headers = 1700000000.25, {"comment": "x" * 2000}
        infos.append((info, content))
    path = write_tar(tmp_path / "in" / "0.tar", infos)
    assert path.stat().st_size > 9 * 4096
    assert [image for _, image, _ in in_both_ways(tmp_path / "in", tmp_path)] == [
        picture(number) for number in range(3)
    ]


def test_names_in_pax_records_that_are_no_ascii(tmp_path):
    members = [("größe.jpg", picture(1)), ("größe.txt", b"size"), *triples([2])]
    write_tar(tmp_path / "in" / "0.tar", members, tarfile.PAX_FORMAT)
    assert take_in(tmp_path / "in", tmp_path / "linked") == 0
    assert [caption for _, _, caption in rows(tmp_path / "linked" / "train")] == ["size", "caption 2"]
    assert verify_split(tmp_path / "linked" / "train", Limits(), 1).problems == []


@pytest.mark.parametrize("magic, program", [("gz", "gunzip"), ("bz2", "bunzip2"), ("xz", "unxz")])
def test_a_compressed_tar_is_refused_by_its_content(tmp_path, capsys, magic, program):
    with tarfile.open(tmp_path / "0.tar", f"w:{magic}") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    assert take_in(tmp_path, tmp_path / "out") == 2
    assert program in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_folder_of_compressed_tars_is_no_empty_folder(tmp_path, capsys):
    (tmp_path / "0.tar.gz").write_bytes(b"\x1f\x8b")
    assert take_in(tmp_path, tmp_path / "out") == 2
    assert "compressed" in capsys.readouterr().err
    (tmp_path / "0.tar.gz").unlink()
    assert take_in(tmp_path, tmp_path / "out") == 2
    assert "no .tar in it" in capsys.readouterr().err


def test_links_devices_and_sparse_members(tmp_path):
    """A link could lead anywhere; where members after a sparse one lie is uncertain."""
    link = tarfile.TarInfo("2.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    write_tar(tmp_path / "in" / "0.tar", [*triples([1]), (link, b""), ("2.txt", b"x")])
    sparse = tarfile.TarInfo("3.jpg")
    sparse.pax_headers = {"GNU.sparse.map": "0,10", "GNU.sparse.size": "4096", "GNU.sparse.numblocks": "1"}
    write_tar(tmp_path / "in" / "1.tar", [(sparse, b"x" * 10), ("3.txt", b"x"), *triples([4])])
    assert len(in_both_ways(tmp_path / "in", tmp_path)) == 1
    assert rejected(tmp_path / "linked" / "train") == {"not_a_plain_member": 1, "unreadable_shard": 1}
    assert "sparse" in (tmp_path / "linked" / "train" / "rejected.jsonl").read_text()
    assert not (tmp_path / "linked" / "train" / "1.tar").exists()


def test_what_stands_behind_the_end_of_a_tar_is_named(tmp_path):
    """Trap: readers stop at the first zero blocks, so of two tars in one file the second is lost without a word."""
    first, second = (write_tar(tmp_path / name, triples([number])) for number, name in enumerate(("a", "b")))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar").write_bytes(first.read_bytes() + second.read_bytes())
    (tmp_path / "in" / "1.tar").write_bytes(first.read_bytes() + b"\0" * 100_000)
    assert len(in_both_ways(tmp_path / "in", tmp_path)) == 2
    assert rejected(tmp_path / "linked" / "train") == {"data_after_end": 1}
    detail = json.loads((tmp_path / "linked" / "train" / "rejected.jsonl").read_text())["detail"]
    assert f"data at byte {first.stat().st_size};" in detail


def test_truncated_empty_and_foreign_files_among_the_tars(tmp_path):
    write_tar(tmp_path / "in" / "0.tar", triples(range(3)))
    (tmp_path / "in" / "1.tar").write_bytes(b"")
    (tmp_path / "in" / "2.tar").write_bytes(b"<html>not found</html>" * 100)
    assert len(in_both_ways(tmp_path / "in", tmp_path)) == 3
    assert rejected(tmp_path / "linked" / "train") == {"unreadable_shard": 2}


def test_wherever_a_tar_is_cut_whole_samples_stay_and_it_is_named(tmp_path):
    path = write_tar(tmp_path / "0.tar", triples(range(3)), tarfile.USTAR_FORMAT)
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        ends = [member.offset_data + member.size for member in tar]
    for cut in range(0, ends[-1] + 600, 300):
        path.write_bytes(whole[:cut])
        content = read_tar(path, "0.tar")
        kept = [sample.key for sample in content.samples if len(sample.members) == 3]
        assert kept == [f"{number:09d}" for number in range(sum(end <= cut for end in ends[2::3]))], cut
        assert content.problems or cut >= ends[-1] + 512, cut


def test_verify_notices_a_foreign_shard_that_changed(tmp_path):
    path = write_tar(tmp_path / "in" / "0.tar", triples(range(3)))
    assert take_in(tmp_path / "in", tmp_path / "out") == 0
    content = bytearray(path.read_bytes())
    content[-20_000:-15_000] = os.urandom(5000)
    with open(path, "r+b") as stream:  # in the same file, which the split is linked to
        stream.write(content)
    assert verify_split(tmp_path / "out" / "train", Limits(), 1).problems


def test_names_that_are_no_utf8(tmp_path, capsys):
    """Finding C15's kind: such a name is no traceback; in place it can't be read, a copy has it."""
    members = [("caf\udce9.jpg", picture(1)), ("caf\udce9.txt", b"coffee"), ("\udce9.jpg", picture(2)), *triples([3])]
    write_tar(tmp_path / "in" / "0.tar", members, tarfile.GNU_FORMAT)
    assert take_in(tmp_path / "in", tmp_path / "linked") == 2
    assert "--copy" in capsys.readouterr().err
    assert take_in(tmp_path / "in", tmp_path / "copied", "--copy") == 0
    assert [caption for _, _, caption in rows(tmp_path / "copied" / "train")] == ["coffee", "caption 3"]
