"""One part: its bytes depend on its rows alone, it is published whole or not at all, and it counts every row."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest

from data_prep.parts import part as module
from data_prep.parts.claims import Claims
from data_prep.parts.part import CLAIMED, DONE, FAILED, MADE, PartOptions, make_part, read_part
from data_prep.record import PrepError, UrlRow
from tests.data_prep.parts.image_server import files
from tests.data_prep.parts.made_parts import OPTIONS, answer, made, planned, url_rows


def test_a_part_has_its_rows_in_order_and_counts_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, {3: "HTTP Error 404: Not Found", 4: "timed out", 13: "HTTP Error 503: Busy"}, lost=[6])
    plan = made(planned(tmp_path, [*url_rows(20)[:-1], UrlRow(19, "http://h/19", ("a", " ", "c"), {})]))
    report = read_part(plan, 0)
    assert report.rows == 7 and report.rejected == {"http_404": 1, "lost_by_downloader": 1, "timeout": 1}
    assert (report.urls, report.downloaded) == (10, 7) and [shard.samples for shard in report.shards] == [4, 3]
    second = read_part(plan, 1)
    assert second.rows == 10 and second.rejected == {"empty_caption": 1, "http_503": 1}
    lines = [json.loads(line) for line in (plan.done(0) / "rejected.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == ["row 3: http://h/3", "row 4: http://h/4", "row 6: http://h/6"]
    assert "again" not in lines[0]  # gone for good: its address is not kept twice
    assert lines[1]["again"] == {"row": 4, "url": "http://h/4", "captions": ["picture 4"], "extra": {"n": 4}}
    made_again = planned(tmp_path / "again", [*url_rows(20)[:-1], UrlRow(19, "http://h/19", ("a", " ", "c"), {})])
    monkeypatch.setattr(module.InOrder, "__init__", _without_memory(module.InOrder.__init__))
    made(made_again)
    for number in range(2):
        first, again = files(plan.done(number)), files(made_again.done(number))
        assert {n: c for n, c in first.items() if n != "part.json"} == {
            n: c for n, c in again.items() if n != "part.json"
        }


def _without_memory(init):
    return lambda self, spill, max_bytes=0: init(self, spill, 0)


def test_a_part_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch)
    plan = planned(tmp_path, url_rows(20))
    claim = Claims(plan).take(0, "aa", "other")
    assert make_part(plan.folder, 0, OPTIONS) == CLAIMED
    claim.release()
    assert make_part(plan.folder, 0, OPTIONS) == MADE and make_part(plan.folder, 0, OPTIONS) == DONE
    assert not list((plan.folder / "claims").iterdir()) and not list((plan.folder / "attempts").iterdir())


def test_of_attempts_at_once_one_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claims may fail; publishing does not."""
    answer(monkeypatch)
    plan = planned(tmp_path, url_rows(10))

    class NoClaims:
        def take(self, number, attempt, run):
            return type("Claim", (), {"beat": lambda self, **_: None, "release": lambda self: None})()

    found, start = [], threading.Barrier(5)

    def run() -> None:
        start.wait()
        found.append(make_part(plan.folder, 0, OPTIONS, NoClaims()))

    monkeypatch.setattr(module, "_log", lambda path: open(path, "a"))  # one stdout of all threads
    threads = [threading.Thread(target=run) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 5 and set(found) <= {MADE, DONE}
    assert read_part(plan, 0).rows == 10 and not list((plan.folder / "attempts").iterdir())


@pytest.mark.parametrize(
    ("errors", "least", "outcome"),
    [
        (range(10), 0.1, FAILED),
        (range(9), 0.1, MADE),
        (range(9), 0.2, FAILED),
        (range(10), 0.0, MADE),  # whoever asks for nothing gets it
    ],
)
def test_a_part_with_too_few_images_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, errors, least, outcome
) -> None:
    answer(monkeypatch, dict.fromkeys(errors, "Name or service not known"))
    plan = planned(tmp_path, url_rows(10))
    assert make_part(plan.folder, 0, PartOptions("run", min_yield=least)) == outcome
    assert plan.is_done(0) == (outcome == MADE)
    if outcome == FAILED:
        assert json.loads(plan.failure(0).read_text())["rejected"] == {"dns_failure": len(errors)}
        answer(monkeypatch)  # the network is back
        assert make_part(plan.folder, 0, PartOptions("next", min_yield=least)) == MADE
        assert not plan.failure(0).exists()


def test_pages_instead_of_images_are_a_failure_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A captive portal answers 200 to everything."""
    answer(monkeypatch)
    plan = planned(tmp_path, url_rows(10))
    monkeypatch.setattr("tests.data_prep.parts.made_parts.jpeg", lambda number: b"<html>log in</html>")
    assert make_part(plan.folder, 0, OPTIONS) == FAILED
    assert json.loads(plan.failure(0).read_text())["rejected"] == {"not_an_image": 10}


def test_an_error_of_the_disk_is_no_lost_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """img2dataset prints what goes wrong with a sample, and goes on."""
    answer(monkeypatch)
    plan = planned(tmp_path, url_rows(10))

    def full(self, record):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.ShardFolder, "add", full)
    with pytest.raises(OSError, match="No space left"):
        make_part(plan.folder, 0, OPTIONS)
    assert not plan.is_done(0) and not list((plan.folder / "attempts").iterdir())
    assert not list((plan.folder / "claims").iterdir())


def test_whose_attempt_was_taken_over_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process thought this one dead, and has removed what it wrote."""
    answer(monkeypatch)
    plan = planned(tmp_path, url_rows(10))
    inner = module.download

    def overtaken(*given):
        inner(*given)
        for attempt in (plan.folder / "attempts").iterdir():
            shutil.rmtree(attempt)

    monkeypatch.setattr(module, "download", overtaken)
    assert make_part(plan.folder, 0, OPTIONS) == CLAIMED


@pytest.mark.parametrize("damage", ["shard missing", "shard cut", "report damaged", "report a link", "folder a link"])
def test_a_damaged_part_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    answer(monkeypatch)
    plan = made(planned(tmp_path, url_rows(10)))
    folder, report = plan.done(0), plan.done(0) / "part.json"
    if damage == "shard missing":
        (folder / "00000.tar").unlink()
    elif damage == "shard cut":
        (folder / "00000.tar").write_bytes(b"x")
    elif damage == "report damaged":
        report.write_text('{"shards": [{"file": "../x"}]}')
    else:
        path = report if damage == "report a link" else folder
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PrepError, match="00000.*made again"):
        read_part(plan, 0)


def test_the_log_is_not_written_through_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch)
    plan = planned(tmp_path, url_rows(10))
    plan.log(0).symlink_to(tmp_path / "target")
    with pytest.raises(OSError):
        make_part(plan.folder, 0, OPTIONS)
    assert not (tmp_path / "target").exists()
