"""Plans and parts without a network: the downloader is replaced by a table of answers."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import pytest

from data_prep.filters import Limits
from data_prep.parts import part
from data_prep.parts.part import MADE, PartOptions, make_part
from data_prep.parts.plan import Plan, Recipe, make_plan
from data_prep.record import Rejection, UrlRow
from tests.data_prep.parts.image_server import jpeg

OPTIONS = PartOptions("run")


def recipe(rows_per_part: int = 10, samples_per_shard: int = 4, **more) -> Recipe:
    provenance = {"source": "test", "arguments": {"input": "rows.tsv"}, "versions": {"python": "3"}}
    more = {"request": {"input": "rows.tsv"}, "limits": vars(Limits()), "provenance": provenance} | more
    return Recipe("web", "train", samples_per_shard=samples_per_shard, rows_per_part=rows_per_part, **more)


def url_rows(count: int) -> list[UrlRow]:
    return [UrlRow(number, f"http://h/{number}", (f"picture {number}",), {"n": number}) for number in range(count)]


def answer(monkeypatch: pytest.MonkeyPatch, errors: dict[int, str] | None = None, lost: Iterable[int] = ()) -> None:
    """From now on a row gives its picture, or one of ``errors``; each part's rows come in another order."""
    errors, lost = errors or {}, set(lost)

    def download(table: Path, rows: int, scratch: Path, options, received) -> None:
        found = list(enumerate(part.read_rows(table, ["row"])))
        random.Random(rows).shuffle(found)
        for position, row in found:
            number = row["row"]
            if number not in lost:
                received(position, None if number in errors else jpeg(number), errors.get(number))

    monkeypatch.setattr(part, "download", download)


def planned(folder: Path, rows: Iterable[UrlRow | Rejection], **more) -> Plan:
    return make_plan(folder / "web" / "train", recipe(**more), rows)


def made(plan: Plan) -> Plan:
    """The plan with all its parts made."""
    for number in range(plan.parts):
        assert make_part(plan.folder, number, OPTIONS) == MADE
    return plan
