"""The doctor: each planted defect is found, named and repaired or quarantined; what is healthy is not touched."""

import json
import os
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pytest

from data_prep.__main__ import main
from data_prep.checks.measure import measure_split
from data_prep.checks.verify import verify_split
from data_prep.filters import REASONS, Limits
from data_prep.manifest import load_manifest, read_manifest
from data_prep.record import Record
from data_prep.repairing.diagnosis import KINDS, examine
from pipeline.data.shard_reader import Corpus
from tests.data_prep.checks.planted_defects import (
    INDEX,
    LOST_SAMPLE,
    LOST_SHARD,
    REPAIRED,
    SHARD,
    edit_index,
    flip,
    manifest_content,
    members,
    replace_tar,
    tar_of,
)
from tests.data_prep.checks.splits import jpeg, records, state, write_split, write_unchecked


@pytest.fixture
def split_dir(tmp_path):
    write_split(tmp_path / "c" / "train")
    return tmp_path / "c" / "train"


def doctor(*arguments):
    return main(["doctor", *map(str, arguments), "--workers", "1", "--min-age", "0"])


def assert_sound(split_dir, rows):
    """Verify finds nothing, training reads every row, and the counts of the manifest hold."""
    found = verify_split(split_dir, Limits(), 1)
    assert found.problems == [] and found.rows == rows
    corpus = Corpus(split_dir)
    texts = {corpus.read(row).text for row in range(len(corpus))}
    assert len(corpus) == rows == len(texts)
    manifest = read_manifest(split_dir)
    lines = [json.loads(line) for line in (split_dir / "rejected.jsonl").read_text().splitlines()]
    counted = {reason: sum(one["rows"] for one in lines if one["reason"] == reason) for reason in manifest.rejected}
    assert counted == manifest.rejected and set(counted) <= {*REASONS, "http_404"}
    assert manifest.rows + sum(manifest.rejected.values()) == 14, "rows read = written + rejected"
    assert manifest.provenance["passport"] == measure_split(split_dir, manifest, 1).as_json()


def test_a_healthy_split_is_not_touched(split_dir, capsys):
    before = state(split_dir.parent)
    assert doctor(split_dir.parent.parent, "--repair", "--decode") == 0
    assert state(split_dir.parent) == before
    assert "12 rows, 6 samples, 6 images decoded: healthy" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [*LOST_SHARD, *REPAIRED, *LOST_SAMPLE])
def test_what_is_planted_is_named_and_repaired(split_dir, kind, capsys):
    {**LOST_SHARD, **REPAIRED, **LOST_SAMPLE}[kind](split_dir)
    planted = state(split_dir.parent)
    assert doctor(split_dir, "--dry-run") == 1
    said = capsys.readouterr().out
    assert f"{kind} (" in said and KINDS[kind].breaks in said and KINDS[kind].repair in said
    assert state(split_dir.parent) == planted, "nothing is changed without --repair"
    assert doctor(split_dir, "--repair") == 0, capsys.readouterr().out
    assert_sound(split_dir, 8 if kind in LOST_SHARD else 10 if kind in LOST_SAMPLE else 12)
    repaired = state(split_dir)
    assert doctor(split_dir, "--repair") == 0 and state(split_dir) == repaired


@pytest.mark.parametrize("kind", ["changed_shard", "truncated_shard", "link_out", "stray_file", "appended_data"])
def test_nothing_is_deleted(split_dir, tmp_path, kind):
    {**LOST_SHARD, **REPAIRED}[kind](split_dir)
    name = "00009.tar" if kind == "stray_file" else SHARD
    content = (split_dir / name).read_bytes()
    assert doctor(split_dir, "--repair", "--quarantine", tmp_path / "q") == 0
    assert (tmp_path / "q" / "c" / "train" / name).read_bytes() == content


@pytest.mark.parametrize("kind", ["missing_index", "changed_index", "bad_index"])
def test_an_index_made_again_is_the_same_to_the_byte(split_dir, kind):
    before = (split_dir / INDEX).read_bytes(), (split_dir / "manifest.json").read_bytes()
    REPAIRED[kind](split_dir)
    assert doctor(split_dir, "--repair") == 0
    assert ((split_dir / INDEX).read_bytes(), (split_dir / "manifest.json").read_bytes()) == before


def test_pairs_of_images_and_a_reduced_index_are_made_again(tmp_path):
    items = [Record(f"p{i}", (jpeg(i), jpeg(9 * i)), ("same", "not"), {"label": "x"}) for i in range(3)]
    write_unchecked(tmp_path / "c" / "train", [replace(one, extensions=("jpg", "jpg")) for one in items], num_images=2)
    split_dir = tmp_path / "c" / "train"
    edit_index(split_dir, lambda index: index.__setitem__((0, 1), 7), "00000.index.npy")
    assert doctor(split_dir, "--repair") == 0
    (reduced,) = split_dir.glob("00000.index.*.npy")
    content = reduced.read_bytes()
    reduced.unlink()
    assert doctor(split_dir, "--repair") == 0 and reduced.read_bytes() == content
    assert verify_split(split_dir, Limits(), 1).problems == []


def test_decoding_finds_what_hashes_do_not(tmp_path, capsys):
    bad = Record("bad", (b"no image",), ("a", "b"), {}, ("jpg",))
    cut = Record("cut", (jpeg(7, (200, 200))[:-200],), ("c",), {}, ("jpg",))
    empty = Record("empty", (jpeg(),), (" ",), {}, ("jpg",))
    fine = [replace(record, extensions=("jpg",)) for record in records()[:3]]
    split_dir = tmp_path / "c" / "train"
    manifest = write_unchecked(split_dir, [bad, fine[0], cut, empty, *fine[1:]])
    assert doctor(split_dir) == 0, "written so: the hashes are right"
    assert doctor(split_dir, "--decode", "--repair") == 0
    assert "undecodable_image (2)" in capsys.readouterr().out
    repaired = read_manifest(split_dir)
    assert repaired.rejected == {"not_an_image": 2, "truncated_image": 1, "empty_caption": 1}
    assert repaired.rows == manifest.rows - 4 and verify_split(split_dir, Limits(), 1).problems == []
    assert [shard.file for shard in repaired.shards] == ["00000.tar", "00002.tar"], "in 00001 no sample was left"


def test_keys_that_come_again_leave_the_later_sample_out(tmp_path, capsys):
    items = [Record(key, (jpeg(i),), (f"text {i}",), {}, ("jpg",)) for i, key in enumerate("abbcad")]
    split_dir = tmp_path / "c" / "train"
    write_unchecked(split_dir, items, samples_per_shard=3)
    assert doctor(split_dir, "--repair") == 0
    said = capsys.readouterr().out
    assert "member 'b.jpg' occurs 2 times" in said and "key a occurs 2 times, here in 00001.tar" in said
    corpus = Corpus(split_dir)
    assert [corpus.read(row).text for row in range(len(corpus))] == ["text 0", "text 1", "text 3", "text 5"]
    assert read_manifest(split_dir).rejected == {"duplicate_key": 2}


def test_what_can_not_be_repaired_is_left_and_says_so(split_dir, capsys):
    (split_dir / "manifest.json").unlink()
    before = state(split_dir)
    assert doctor(split_dir.parent, "--repair") == 1
    assert "no_manifest (1)" in capsys.readouterr().out and state(split_dir) == before


def test_a_split_without_a_usable_shard_stays_as_it_is(split_dir, capsys):
    for path in split_dir.glob("*.tar"):
        flip(path, 700)
    before = state(split_dir)
    assert doctor(split_dir, "--repair") == 1
    assert "no usable shard would be left; nothing changed" in capsys.readouterr().out and state(split_dir) == before


def test_trailing_data_that_was_written_so_is_told_and_left(split_dir, capsys):
    stream = (split_dir / SHARD).read_bytes()
    replace_tar(split_dir, stream + stream[:2048] + bytes(1024))
    assert doctor(split_dir, "--repair") == 1
    assert "members after the end-of-archive block" in capsys.readouterr().out


def test_pax_headers_are_a_note(split_dir, capsys):
    entries = members(split_dir)
    for member, _ in entries:
        member.mtime = 1.5
    content = tar_of(entries, format=tarfile.PAX_FORMAT)
    replace_tar(split_dir, content)
    with tarfile.open(split_dir / SHARD) as tar:
        places = {member.name: member.offset_data for member in tar}
    index = np.load(split_dir / INDEX)
    for row, key in enumerate(("k2", "k2", "k3", "k3")):
        index[row, [0, 2, 4]] = [places[f"{key}.{extension}"] for extension in ("jpg", "txt", "json")]
    edit_index(split_dir, lambda stored: stored.__setitem__(slice(None), index))
    assert doctor(split_dir) == 0
    assert "note: " in (said := capsys.readouterr().out) and "PAX headers" in said


@pytest.mark.parametrize("repair", [False, True])
def test_what_killed_runs_left_beside(split_dir, repair, capsys):
    corpus = split_dir.parent
    names = (".dev.4999999.part", ".train.4999999.old", ".train.parts", ".train.parts.0123456789ab", ".train.input")
    left = [corpus / name for name in names]
    for folder in (*left, corpus / ".dev.parts"):
        folder.mkdir()
        (folder / "x").write_text("x")
    mine = corpus / f".test.{os.getppid()}.part"
    mine.mkdir()
    assert doctor(corpus, *(["--repair"] if repair else [])) == (0 if repair else 1)
    said = capsys.readouterr().out
    assert "a split whose writing was cut off" in said or repair
    assert [folder.exists() for folder in left] == [not repair] * 5
    assert mine.exists() and (corpus / ".dev.parts").exists(), "a running process's, and one that can go on"
    assert "the same command goes on with it" in said


def test_a_recent_leftover_may_be_at_work_on_another_machine(split_dir):
    (split_dir.parent / ".dev.4999999.part").mkdir()
    assert main(["doctor", str(split_dir.parent), "--repair", "--workers", "1"]) == 0
    assert (split_dir.parent / ".dev.4999999.part").exists()


@pytest.mark.parametrize("killed", ["before the first renaming", "between them", "after both"])
def test_a_replacement_that_was_killed_ends_with_a_whole_split(split_dir, killed):
    """Invariant 6: the new split, where it is complete; nothing that is the only one is removed."""
    corpus = split_dir.parent
    new, old = corpus / ".train.4999999.part", corpus / ".train.4999999.old"
    os.rename(split_dir, new)
    write_split(split_dir, records(2))
    if killed != "before the first renaming":
        os.rename(split_dir, old)
    if killed == "after both":
        os.rename(new, split_dir)
    assert doctor(corpus) == 1
    assert doctor(corpus, "--repair") == 0
    assert read_manifest(split_dir).samples == (2 if killed == "before the first renaming" else 6)
    assert not new.exists() and not old.exists()
    kept = list((corpus / ".quarantine").rglob("manifest.json"))
    assert len(kept) == (killed == "before the first renaming"), "a finished split is moved, not removed"


def test_an_old_split_alone_is_put_back(split_dir):
    os.rename(split_dir, split_dir.parent / ".train.4999999.old")
    assert doctor(split_dir.parent, "--repair") == 0
    assert_sound(split_dir, 12)


@pytest.mark.parametrize("arguments", [["--quarantine", "q"], ["missing"]])
def test_wrong_use(split_dir, arguments, capsys):
    assert doctor(*([split_dir] if arguments[0].startswith("-") else []), *arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_root_of_corpora_is_looked_through(tmp_path, capsys):
    for name in ("a", "b"):
        write_split(tmp_path / name / "train")
    flip(tmp_path / "b" / "train" / SHARD, 700)
    assert doctor(tmp_path) == 1
    said = capsys.readouterr().out
    assert f"{tmp_path / 'a' / 'train'}: 12 rows, 6 samples: healthy" in said and "changed_shard (1)" in said


@pytest.mark.slow(8)
def test_hostile_tars_are_bounded(split_dir):
    """Invariant 7: announced sizes, many tiny members and long headers cost no more than their bytes."""
    replace_tar(split_dir, tarfile.TarInfo("m.txt").tobuf(tarfile.USTAR_FORMAT) * 100_000 + bytes(1024))
    assert {problem.kind for problem in examine(split_dir, None, 1).problems} >= {"bad_row", "unindexed_member"}
    huge = tarfile.TarInfo("k.jpg")
    huge.size = 2**60
    for content, expected in [
        (huge.tobuf(tarfile.GNU_FORMAT) + bytes(1024), "truncated_shard"),
        (pax_header(2**40), "truncated_shard"),
        (pax_header(1 << 20) + bytes(1 << 20), "broken_header"),
    ]:
        replace_tar(split_dir, content)
        assert expected in {problem.kind for problem in examine(split_dir, None, 1).problems}


def pax_header(size):
    header = tarfile.TarInfo("././@PaxHeader")
    header.type, header.size = tarfile.XHDTYPE, size
    return header.tobuf(tarfile.GNU_FORMAT)


STEPS = ("replace", "rename", "unlink", "fsync", "link")  # what a repair does to the file system, by functions of os


def killed_repair(split_dir, step, monkeypatch):
    """Repair in a child that dies at its ``step``-th change; whether it died."""
    child = os.fork()
    if child == 0:
        left = [step]
        for name in STEPS:
            monkeypatch.setattr(os, name, dying(getattr(os, name), left))
        try:
            code = doctor(split_dir, "--repair")
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 9


def dying(function, left):
    def call(*arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            os._exit(9)
        return function(*arguments, **options)

    return call


@pytest.mark.slow(12)
def test_a_repair_killed_at_any_moment_is_repaired_again(split_dir, tmp_path, monkeypatch):
    """Invariant 6: after each change the split is the old or the new one, and no row counts twice."""
    flip(split_dir / SHARD, 700)
    edit_index(split_dir, lambda index: index.__setitem__((0, 1), 7), "00000.index.npy")
    (split_dir / "00009.tar").write_bytes(b"who knows")
    with open(split_dir / "00002.tar", "ab") as stream:
        stream.write(b"x" * 700)
    step, died = 0, True
    while died:
        copy = tmp_path / f"killed{step}" / "c" / "train"
        shutil.copytree(split_dir, copy)
        died = killed_repair(copy, step, monkeypatch)
        assert {shard.file for shard in load_manifest(copy).shards} >= {"00000.tar", "00002.tar"}
        assert doctor(copy, "--repair") == 0
        assert_sound(copy, 6)
        step += 1
    assert step > 15, "each change was tried"


@pytest.mark.parametrize(
    "changes",
    [
        {"provenance": {"dropped": value, "repairs": value, "passport": value}}
        for value in (5, "x", [1], {"a": 1}, None)
    ],
)
def test_provenance_of_any_kind_ends_in_no_traceback(split_dir, changes, capsys):
    manifest_content(split_dir, **changes)
    flip(split_dir / SHARD, 700)
    assert doctor(split_dir, "--repair") == 0
    assert main(["info", str(split_dir)]) == 0
    assert main(["report", str(split_dir), "--workers", "1"]) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


def test_fields_of_a_manifest_that_are_no_texts_are_one_line(split_dir, capsys):
    manifest_content(split_dir, fields=["image", 5, "meta"])
    assert doctor(split_dir, "--repair") == 1 and "must be strings" in capsys.readouterr().out
