"""What is to be downloaded, as a folder: always the same, of one request, and nobody's links."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from data_prep.downloading.fetch import read_rows
from data_prep.parts import plan as plans
from data_prep.parts.plan import FOLDERS, drop_fruitless_plan, make_plan, open_plan, plan_folder
from data_prep.record import PrepError, Rejection, UrlRow
from tests.data_prep.parts.made_parts import planned, recipe, url_rows

COLUMNS = ["url", "row", "captions", "extra"]


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [
        (0, []),
        (1, [1]),
        (10, [10]),
        (13, [7, 6]),
        (15, [10, 5]),
        (20, [10, 10]),
        (21, [10, 6, 5]),
        (38, [10, 10, 10, 8]),
    ],
)
def test_parts_have_equal_sizes_and_no_small_rest(tmp_path: Path, rows: int, sizes: list[int]) -> None:
    plan = planned(tmp_path, url_rows(rows))
    tables = [list(read_rows(plan.table(number), COLUMNS)) for number in range(plan.parts)]
    assert [len(table) for table in tables] == sizes and plan.urls == rows
    assert [row["row"] for table in tables for row in table] == list(range(rows))


def test_rows_keep_what_they_have(tmp_path: Path) -> None:
    """Commas, quotes, line breaks and other letters: always handed over as parquet."""
    awkward = UrlRow(7, 'http://h/"a",b', ('one,\n"two"', "ünï"), {"list": [1, None]})
    plan = planned(tmp_path, [Rejection("bad_url", "row 0: x", rows=2), awkward])
    [row] = read_rows(plan.table(0), COLUMNS)
    assert (row["url"], row["row"], tuple(row["captions"]), json.loads(row["extra"])) == (
        *(awkward.url, awkward.number, awkward.captions, awkward.extra),
    )
    assert plan.rejected == {"bad_url": 2}


def test_a_plan_is_kept_and_one_of_another_request_is_refused(tmp_path: Path) -> None:
    plan = planned(tmp_path, url_rows(30))
    assert planned(tmp_path, iter(())) == plan  # rows are not read again
    for other in ({"request": {"input": "other.tsv"}}, {"samples_per_shard": 5}, {"drop_duplicates": True}):
        with pytest.raises(PrepError, match=f"other options .{next(iter(other))}.*--restart"):
            planned(tmp_path, url_rows(30), **other)


def test_a_table_that_cannot_be_read_leaves_nothing(tmp_path: Path) -> None:
    def rows():
        yield from url_rows(15)
        raise PrepError("broken table")

    with pytest.raises(PrepError, match="broken table"):
        planned(tmp_path, rows())
    assert list((tmp_path / "web").iterdir()) == []


def test_of_several_planners_one_succeeds_and_all_have_its_plan(tmp_path: Path) -> None:
    found, start = [], threading.Barrier(6)

    def run() -> None:
        start.wait()
        found.append(planned(tmp_path, url_rows(25)))

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6 and all(one == found[0] for one in found)
    assert [path.name for path in (tmp_path / "web").iterdir()] == [".train.parts"]


@pytest.mark.parametrize("name", [None, "plan.json", *FOLDERS])
def test_links_in_place_of_the_plan_are_refused(tmp_path: Path, name: str | None) -> None:
    """Whoever may write beside a split must not lead the program elsewhere."""
    plan = planned(tmp_path, url_rows(3))
    path = plan.folder if name is None else plan.folder / name
    os.rename(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PrepError, match="a link, expected a"):
        make_plan(plan.split_dir, recipe(), url_rows(3))
    plans.drop_plan(plan_folder(plan.split_dir))
    if name is None:
        assert (tmp_path / "elsewhere" / "plan.json").is_file()  # what a link led to is left alone


@pytest.mark.parametrize("content", [b"{}", b"[1]", b"\xff", b'{"format": 9}'])
def test_a_damaged_plan_is_one_line(tmp_path: Path, content: bytes) -> None:
    plan = planned(tmp_path, url_rows(3))
    (plan.folder / "plan.json").write_bytes(content)
    with pytest.raises(PrepError, match="no plan of parts .*--restart") as error:
        open_plan(plan.folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kept", ["nothing", "a part that is made", "a part that somebody makes", "the same recipe"])
def test_a_plan_that_came_to_nothing_makes_room_for_another(kept: str, tmp_path: Path) -> None:
    folder = planned(tmp_path, url_rows(3)).folder
    if kept == "a part that is made":
        (folder / "done" / "00000").mkdir()
    elif kept == "a part that somebody makes":
        (folder / "claims" / "00000.json").write_text("{}")
    drop_fruitless_plan(folder, recipe() if kept == "the same recipe" else recipe(rows_per_part=7))
    assert folder.exists() == (kept != "nothing")
    drop_fruitless_plan(tmp_path / "none", recipe())
