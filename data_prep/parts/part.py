"""Makes one part of a split: downloads its rows, judges them, writes final shards, and publishes them in one step."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep.downloading.failures import can_change, failure_reason
from data_prep.downloading.fetch import FetchOptions, download, read_rows
from data_prep.filters import DuplicateFilter, check_record
from data_prep.manifest import first_bad_file, sync_directory, write_atomically
from data_prep.parts.claims import Claim, Claims
from data_prep.parts.in_order import InOrder
from data_prep.parts.plan import Plan, open_plan
from data_prep.passport import Statistics
from data_prep.record import LowYieldError, PrepError, Record, Rejection
from data_prep.shard_table import ShardTable
from data_prep.shard_writer import ShardFolder

DONE, MADE, CLAIMED, FAILED = "done", "made", "claimed", "failed"
BEAT_SECONDS = 2.0
_COLUMNS = ["url", "row", "captions", "extra"]


@dataclass(frozen=True)
class PartOptions:
    """How parts are made, which their content does not depend on; ``run`` is the name of this run, ``min_yield`` the
    share of a part's addresses and rows that must be usable."""

    run: str
    fetch: FetchOptions = field(default_factory=FetchOptions)
    min_yield: float = 0.1
    stale_seconds: float | None = None


@dataclass(frozen=True)
class PartReport:
    """What is known of a part that is made: ``urls`` tried, ``downloaded`` images, ``rows`` written."""

    urls: int
    downloaded: int
    rows: int
    rejected: dict[str, int]
    failures: dict[str, int]
    shards: ShardTable
    statistics: Statistics
    suffixes: tuple[str, ...]  # what follows the keys of its members


def make_part(folder: Path, number: int, options: PartOptions, claims: Claims | None = None) -> str:
    """Make part ``number`` of the plan in ``folder``: DONE before, MADE, CLAIMED by somebody else, or FAILED.

    Raises PrepError and OSError for what will not go away by trying another part.
    """
    plan = open_plan(folder)
    if plan.is_done(number):
        return DONE
    attempt = uuid.uuid4().hex
    claim = (claims or _claims(plan.folder, options.stale_seconds)).take(number, attempt, options.run)
    if claim is None:
        return CLAIMED
    place = plan.folder / "attempts" / attempt
    try:
        if plan.is_done(number):  # meanwhile
            return DONE
        (place / "part").mkdir(parents=True)
        with _log(plan.log(number)) as log:
            print(f"attempt {attempt} of part {number} by process {os.getpid()}", file=log)
            made = _Making(plan, number, place, options)
            try:
                with _beating(claim, made):
                    report = made.fill()
            except LowYieldError as error:
                made.note_trouble(str(error))
                report = None
            if report is None:
                print(f"failed: {dict(made.failures)}", file=log)
                return FAILED
            _publish(plan, number, place / "part")
            print(f"made: {report.rows} rows of {report.urls} addresses", file=log)
        plan.failure(number).unlink(missing_ok=True)
        return MADE
    except FileNotFoundError:
        if plan.is_done(number) or not place.is_dir():  # somebody took the part over, believing this process dead
            return CLAIMED
        raise
    finally:
        shutil.rmtree(place, ignore_errors=True)
        claim.release()


@functools.cache
def _claims(folder: Path, stale_seconds: float | None) -> Claims:
    """The claims of a plan as this process has seen them over all its calls."""
    return Claims(open_plan(folder), stale_seconds)


class _Making:
    """One attempt: what came so far, and the shards that are written."""

    def __init__(self, plan: Plan, number: int, place: Path, options: PartOptions) -> None:
        self._plan, self._number, self._place, self._options = plan, number, place, options
        self._rows = list(read_rows(plan.table(number), _COLUMNS))
        self._limits = plan.recipe.filters
        self._is_duplicate = DuplicateFilter(plan.recipe.drop_duplicates)
        self._order = InOrder(place / "spill")
        self.seen = self.downloaded = 0
        self.failures: Counter[str] = Counter()

    def fill(self) -> PartReport | None:
        """Write the part; None where its yield is too low, which is noted then. Raises LowYieldError where this machine
        or its network keeps all from coming."""
        self._written = ShardFolder(self._place / "part", 1, self._plan.recipe.samples_per_shard)
        with contextlib.ExitStack() as undone:
            undone.callback(self._order.close)
            unwritten = undone.enter_context(contextlib.ExitStack())  # what is undone unless all of it is there
            unwritten.callback(self._written.abandon)
            scratch = self._place / "scratch"
            scratch.mkdir()
            table = self._plan.table(self._number)
            download(table, len(self._rows), scratch, self._options.fetch, self._received)
            for position in self._order.missing(len(self._rows)):
                self._lose(position, "lost_by_downloader", "")
            self._written.close()
            unwritten.pop_all()
        report = PartReport(
            len(self._rows),
            self.downloaded,
            self._written.rows,
            dict(sorted(self._written.rejected.items())),
            dict(sorted(self.failures.items())),
            ShardTable.of(self._written.shards),
            self._written.statistics,
            tuple(sorted(self._written.suffixes)),
        )
        if self._is_too_low(report):
            write_atomically(self._plan.failure(self._number), json.dumps(_counts(report)))
            return None
        shards = [vars(shard) for shard in report.shards]
        content = {"attempt": self._place.name, **_counts(report), "shards": shards}
        content |= {"suffixes": report.suffixes, "statistics": report.statistics.as_json(top_hosts=None)}
        content["examples"] = {reason: asdict(first) for reason, first in sorted(self._written.examples.items())}
        write_atomically(self._place / "part" / "part.json", json.dumps(content) + "\n")
        return report

    def note_trouble(self, trouble: str) -> None:
        """Note why the download was given up, for whoever watches."""
        counts = {"urls": self.seen, "downloaded": self.downloaded, "rows": 0, "rejected": {}}
        counts |= {"failures": dict(self.failures), "trouble": trouble}
        write_atomically(self._plan.failure(self._number), json.dumps(counts))

    def _is_too_low(self, report: PartReport) -> bool:
        rows = report.rows + sum(report.rejected.values())
        least = self._options.min_yield
        return report.downloaded < least * report.urls or report.rows < least * rows

    def _received(self, position: int, image: bytes | None, message: str | None) -> None:
        """One row as it comes from the downloader, in any order."""
        self.seen += 1
        if image is None:
            self._lose(position, failure_reason(message or ""), (message or "")[:200])
            return
        self.downloaded += 1
        row = self._rows[position]
        meta = {"url": row["url"], **json.loads(row["extra"])}
        key = self._plan.recipe.key(row["row"])
        self._take(position, *check_record(Record(key, (image,), tuple(row["captions"]), meta), self._limits))

    def _lose(self, position: int, reason: str, detail: str) -> None:
        row = self._rows[position]
        self.failures[reason] += 1
        name = f"row {row['row']}: {row['url'][:200]}"
        self._take(position, None, [Rejection(reason, name, detail, rows=len(row["captions"]))])

    def _take(self, position: int, record: Record | None, rejections: list[Rejection]) -> None:
        for number, found, gone in self._order.put(position, record, rejections):
            again = self._again(number) if found is None and any(can_change(one.reason) for one in gone) else None
            for rejection in gone:
                self._written.reject(rejection, again)
            if found is not None:
                found, gone = self._is_duplicate(found)
                for rejection in gone:
                    self._written.reject(rejection)
            if found is not None:
                self._written.add(found)

    def _again(self, position: int) -> dict[str, Any]:
        """What a later try of a row needs."""
        row = self._rows[position]
        return {"row": row["row"], "url": row["url"], "captions": row["captions"], "extra": json.loads(row["extra"])}


def _counts(report: PartReport) -> dict[str, Any]:
    return {name: getattr(report, name) for name in ("urls", "downloaded", "rows", "rejected", "failures")}


def _publish(plan: Plan, number: int, made: Path) -> None:
    """Rename the folder of an attempt to that of the part; where the part is there already, it stays."""
    sync_directory(made)
    try:
        os.rename(made, plan.done(number))
    except OSError:
        if not plan.is_done(number):
            raise
    sync_directory(plan.folder / "done")


def read_part(plan: Plan, number: int, whole: bool = True) -> PartReport:
    """The report of a part that is made; raises PrepError unless it is one, with ``whole`` with all its files."""
    folder = plan.done(number)
    try:
        if folder.is_symlink() or (folder / "part.json").is_symlink():
            raise ValueError("a link")
        stored = json.loads((folder / "part.json").read_bytes())
        shards = ShardTable(stored["shards"])
        report = PartReport(
            *(int(stored[name]) for name in ("urls", "downloaded", "rows")),
            {str(reason): int(count) for reason, count in stored["rejected"].items()},
            {str(reason): int(count) for reason, count in stored["failures"].items()},
            shards,
            Statistics.from_json(stored["statistics"]),
            tuple(stored["suffixes"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PrepError(f"{folder}: no part ({error}); remove this folder to have it made again") from error
    bad = first_bad_file(folder, shards, range(len(shards))) if whole else None
    if bad is not None:
        raise PrepError(f"{bad[1]}; remove {folder} to have the part made again")
    return report


@contextlib.contextmanager
def _log(path: Path) -> Iterator[Any]:
    """What is printed within goes to the log of the part, img2dataset's words too."""
    descriptor = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_NOFOLLOW, 0o666)
    with os.fdopen(descriptor, "a", buffering=1, errors="backslashreplace") as log:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            yield log


@contextlib.contextmanager
def _beating(claim: Claim, made: _Making) -> Iterator[None]:
    """Within, a thread raises the counter of the claim and shows how far the part is."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a full disk ends the part, not the thread
                claim.beat(seen=made.seen, downloaded=made.downloaded, failures=dict(made.failures))

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
