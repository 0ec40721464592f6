"""A split is finished parts under final names: ended anywhere, done again, by several at once, it is the same."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.checks.info import row_texts
from data_prep.checks.verify import verify_split
from data_prep.filters import Limits
from data_prep.manifest import load_manifest, read_manifest
from data_prep.parts import seal as module
from data_prep.parts.plan import Plan, make_plan
from data_prep.parts.retry import failed_rows
from data_prep.parts.seal import seal
from data_prep.record import LowYieldError, PrepError, Rejection
from tests.data_prep.parts.image_server import files
from tests.data_prep.parts.made_parts import answer, made, planned, recipe, url_rows

LATER = {4: "HTTP Error 503: Busy", 5: "HTTP Error 410: Gone", 17: "timed out", 18: "connection refused"}


def sealed(folder: Path) -> Path:
    """A split of 25 rows in 3 parts, of which 4 failed."""
    seal(made(planned(folder, url_rows(25))))
    return folder / "web" / "train"


def test_a_split_is_its_parts_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, LATER)
    plan = made(planned(tmp_path, [Rejection("bad_url", "row 99: x"), *url_rows(25)]))
    manifest = seal(plan)
    split = tmp_path / "web" / "train"
    assert manifest == read_manifest(split) and not plan.folder.exists()
    assert sorted(path.name for path in (tmp_path / "web").iterdir()) == ["README.md", "train"]
    assert list(row_texts(split, manifest)) == [f"picture {n}" for n in range(25) if n not in LATER]
    assert manifest.rejected == {"bad_url": 1, "connection_failed": 1, "http_410": 1, "http_503": 1, "timeout": 1}
    assert manifest.rows + sum(manifest.rejected.values()) == 26
    lines = [json.loads(line) for line in (split / "rejected.jsonl").read_text().splitlines()]
    assert [line["reason"] for line in lines] == ["bad_url", "http_503", "http_410", "timeout", "connection_failed"]
    assert verify_split(split, Limits(), 1).problems == []


class Killed(BaseException):
    """What no code here catches."""


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """End the process at the ``step``th change of the disk from now on."""
    left = [step]

    def counted(call):
        def run(*given, **named):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return call(*given, **named)

        return run

    for name in ("rename", "replace", "mkdir"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    monkeypatch.setattr(module, "write_manifest", counted(module.write_manifest))
    monkeypatch.setattr("data_prep.parts.plan.shutil.rmtree", counted(shutil.rmtree))


def sealed_before(plan: Plan, step: int) -> bool:
    """Whether sealing is over before its ``step``th change of the disk, with which it ends otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, step)
        try:
            seal(plan)
        except Killed:
            return False
    return True


@pytest.mark.parametrize("overwrite", [False, True])
def test_sealing_may_be_ended_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool) -> None:
    answer(monkeypatch, LATER)
    expected = files(sealed(tmp_path / "whole"))
    ends = 0
    for step in range(40):
        folder = tmp_path / str(step)
        if overwrite:
            seal(made(planned(folder, url_rows(3))))
        plan = made(planned(folder, url_rows(25)))
        if sealed_before(plan, step):
            break
        ends += 1
        split = folder / "web" / "train"
        if split.exists():  # visible: then it is whole, the old one or the new one
            assert files(split) == expected or (overwrite and read_manifest(split).rows == 3)
        if plan.folder.exists():
            seal(plan)
        assert files(split) == expected
    assert 10 < ends < 40


def test_several_processes_may_seal_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, LATER)
    expected = files(sealed(tmp_path / "whole"))
    processes = multiprocessing.get_context("fork")
    for attempt in range(10):
        plan = made(planned(tmp_path / str(attempt), url_rows(25)))
        start = processes.Barrier(4)
        several = [processes.Process(target=seal_together, args=(plan, start)) for _ in range(4)]
        for one in several:
            one.start()
        for one in several:
            one.join()
        assert [one.exitcode for one in several] == [0] * 4 and files(plan.split_dir) == expected
        assert sorted(path.name for path in (tmp_path / str(attempt) / "web").iterdir()) == ["README.md", "train"]


def seal_together(plan: Plan, start) -> None:
    start.wait()
    seal(plan)


def test_too_few_rows_and_none_are_errors_that_leave_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch)
    plan = made(planned(tmp_path, [*url_rows(10), Rejection("bad_url", "row 10: x", rows=90)]))
    with pytest.raises(
        LowYieldError, match="only 10 of 100 rows are usable .* 90 bad_url, such as row 10: x; nothing written"
    ):
        seal(plan, min_yield=0.2)
    assert plan.is_done(0) and not plan.split_dir.exists()
    assert seal(plan, min_yield=0.1).rows == 10
    empty = planned(tmp_path / "empty", [Rejection("bad_url", "row 0: ftp://h")])
    with pytest.raises(PrepError, match="no usable record .1 bad_url, such as row 0: ftp://h.; nothing written"):
        seal(empty)


def test_a_link_in_place_of_a_shard_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch)
    plan = made(planned(tmp_path, url_rows(10)))
    shard = plan.done(0) / "00001.tar"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PrepError, match="not the file that was written"):
        seal(plan)
    assert not plan.split_dir.exists()


def again(split: Path) -> Plan:
    """The plan of what failed in a split."""
    known = load_manifest(split)
    rows, others = failed_rows(split)
    again = replace(recipe(), request={"again": known.fingerprint()}, provenance=known.provenance)
    return make_plan(split, again, rows, others, split)


def test_what_failed_is_added_and_nothing_else_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, LATER)
    split = sealed(tmp_path)
    before, old = files(split), read_manifest(split)
    assert [row.number for row in failed_rows(split)[0]] == [4, 17, 18]
    answer(monkeypatch, {17: "HTTP Error 404: Not Found"})
    manifest = seal(made(again(split)))
    assert manifest == read_manifest(split) and manifest.fingerprint() != old.fingerprint()
    assert manifest.rows == 23 and manifest.rejected == {"http_404": 1, "http_410": 1}
    assert sorted(row_texts(split, manifest)) == sorted(f"picture {n}" for n in range(25) if n not in (5, 17))
    after = files(split)
    assert {name: after[name] for name in before if name.endswith((".tar", ".npy"))} == {
        name: content for name, content in before.items() if name.endswith((".tar", ".npy"))
    }
    assert verify_split(split, Limits(), 1).problems == [] and failed_rows(split)[0] == []
    assert (split / "rejected.jsonl").read_text().count("\n") == 2


def test_adding_may_be_ended_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, LATER)
    split = sealed(tmp_path / "whole")
    answer(monkeypatch)
    seal(made(again(split)))
    expected, ends = files(split), 0
    for step in range(40):
        answer(monkeypatch, LATER)
        split = sealed(tmp_path / str(step))
        answer(monkeypatch)
        plan = made(again(split))
        if sealed_before(plan, step):
            break
        ends += 1
        manifest = read_manifest(split)  # whole at every moment, with the old rows or all
        assert manifest.rows in (21, 24)
        if plan.folder.exists():
            seal(plan)
        assert files(split) == expected
    assert 5 < ends < 40


def test_a_split_that_changed_meanwhile_is_not_added_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, LATER)
    split = sealed(tmp_path)
    answer(monkeypatch)
    plan = made(again(split))
    os.rename(plan.folder, tmp_path / "held")
    os.rename(split, tmp_path / "other")
    seal(made(planned(tmp_path, url_rows(12))))
    os.rename(tmp_path / "held", plan.folder)
    before = files(split)
    with pytest.raises(PrepError, match="changed since"):
        seal(plan)
    assert files(split) == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"reason": "timeout", "rows": 1}', "their addresses are not in it"),
        ('{"reason": "timeout", "rows": 1, "again": {"url": 3, "row": 1, "captions": [], "extra": {}}}', "line 1"),
        ("[]", "line 1"),
    ],
)
def test_rejected_lines_that_do_not_serve_are_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "rejected.jsonl").write_text(line + "\n")
    with pytest.raises(PrepError, match=message):
        failed_rows(tmp_path)
