"""Downloads a table of URLs by img2dataset, with limits, supervision, resuming and a count of every row."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from tqdm import tqdm

from data_prep.downloading.courtesy import Courtesy
from data_prep.downloading.failures import diagnose, failure_reason, read_trouble
from data_prep.manifest import write_atomically
from data_prep.record import LowYieldError, PrepError, Record, Rejection, UrlRow
from data_prep.shard_writer import describe_counts

_SCHEMA = pyarrow.schema(
    [("url", "string"), ("row", "int64"), ("captions", pyarrow.list_(pyarrow.string())), ("extra", "string")]
)
_POLL_SECONDS = 0.5
_EARLY_CHECK_URLS = 2000
_MAX_ROWS_PER_PART = 5000


@dataclass(frozen=True)
class FetchOptions:
    """``timeout`` seconds per read (three times that for a whole download), ``retries`` after a failure;
    ``allow_private_addresses`` to download from one's own network;
    ``min_yield`` the share of downloads that must succeed; ``stall_seconds`` without any progress end the run, as does
    ``deadline_seconds`` in all."""

    processes: int = 2
    threads: int = 32
    timeout: int = 10
    retries: int = 1
    min_yield: float = 0.1
    max_image_bytes: int = 50_000_000
    allow_private_addresses: bool = False
    stall_seconds: float = 300.0
    deadline_seconds: float | None = None
    courtesy: Courtesy = Courtesy()


@dataclass(frozen=True)
class Plan:
    """The download of a working folder: ``urls`` rows, in parts of ``rows_per_part``."""

    work: Path
    urls: int
    rows_per_part: int


def plan_download(work: Path, request: dict[str, Any], rows: Iterable[UrlRow | Rejection], processes: int) -> Plan:
    """Write the rows to download into the working folder, or keep those that a run with the same ``request`` wrote.

    Raises PrepError where the folder belongs to another request.
    """
    request_file = work / "request.json"
    if request_file.is_file():
        stored = json.loads(request_file.read_text())
        if stored["request"] != request:
            raise PrepError(f"{work}: a download of another input or other options; give --restart to drop it")
        return Plan(work, stored["urls"], stored["rows_per_part"])
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        count = _write_plan(work, rows)
    except BaseException:  # an unreadable table or Ctrl-C: a half-written plan must not stay
        shutil.rmtree(work, ignore_errors=True)
        raise
    # A few parts for each process, but bounded: a part is what a killed run has to repeat.
    rows_per_part = max(100, min(_MAX_ROWS_PER_PART, -(-count // (4 * processes))))
    write_atomically(request_file, json.dumps({"request": request, "urls": count, "rows_per_part": rows_per_part}))
    return Plan(work, count, rows_per_part)


def _write_plan(work: Path, rows: Iterable[UrlRow | Rejection]) -> int:
    count = 0
    part: list[dict[str, Any]] = []
    with (
        pyarrow.parquet.ParquetWriter(work / "urls.parquet", _SCHEMA) as writer,
        open(work / "rejected.jsonl", "w", encoding="utf-8") as rejected,
    ):
        for row in rows:
            if isinstance(row, Rejection):
                rejected.write(json.dumps(asdict(row)) + "\n")
                continue
            cells = {"url": row.url, "row": row.number, "captions": row.captions, "extra": json.dumps(row.extra)}
            part.append(cells)
            count += 1
            if len(part) == _MAX_ROWS_PER_PART:
                writer.write_table(pyarrow.Table.from_pylist(part, _SCHEMA))
                part = []
        if part:
            writer.write_table(pyarrow.Table.from_pylist(part, _SCHEMA))
    return count


def download(plan: Plan, options: FetchOptions) -> None:
    """Download the planned rows; finished parts of an earlier run are kept if their yield was sufficient.

    Raises LowYieldError with the reasons when too few succeed, PrepError when the downloader stalls or fails.
    """
    urls = plan.urls
    parts = plan.work / "parts"
    parts.mkdir(exist_ok=True)
    _drop_failed_parts(parts, options.min_yield)
    if _progress(parts)[0] < urls:
        _run_downloader(plan, parts, options)
    seen, succeeded, reasons = _progress(parts)
    if seen < urls:
        raise PrepError(
            f"the downloader ended after {seen} of {urls} URLs; see {plan.work / 'img2dataset.log'}, run again"
        )
    if urls and succeeded < options.min_yield * urls:
        raise LowYieldError(_yield_message(succeeded, urls, reasons, options))


def _run_downloader(plan: Plan, parts: Path, options: FetchOptions) -> None:
    work = plan.work
    arguments = {
        "url_list": str((work / "urls.parquet").absolute()),
        "input_format": "parquet",
        "url_col": "url",
        "save_additional_columns": ["row"],
        "output_folder": str(parts.absolute()),
        "output_format": "webdataset",
        "disable_all_reencoding": True,  # the filters judge and shrink, for every source alike
        "extract_exif": False,
        "compute_hash": None,
        "processes_count": options.processes,
        "thread_count": options.threads,
        "number_sample_per_shard": plan.rows_per_part,
        "timeout": options.timeout,
        "retries": options.retries,
        "bounds": {"max_bytes": options.max_image_bytes, "allow_private": options.allow_private_addresses},
        "courtesy": asdict(options.courtesy),
    }
    (work / "options.json").write_text(json.dumps(arguments))
    root = str(Path(__file__).resolve().parents[2])
    search_path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1", "PYTHONPATH": search_path}
    command = [sys.executable, "-m", "data_prep.downloading.bounded_download", str((work / "options.json").absolute())]
    with open(work / "lock", "w") as lock, open(work / "img2dataset.log", "ab") as log:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PrepError(f"{work}: another download is running here; wait for it or end it") from None
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # its processes form a group that can be ended as one
            pass_fds=(lock.fileno(),),  # a downloader holds the lock even when this process has died
        )
        try:
            _watch(process, parts, plan.urls, options)
        finally:
            _end_group(process)


def _watch(process: subprocess.Popen, parts: Path, urls: int, options: FetchOptions) -> None:
    """Wait for the downloader; end it when it stalls, passes its deadline, or clearly yields too little."""
    started = last_change = time.monotonic()
    last_state: object = None
    with tqdm(total=urls, desc="downloading", unit="url", disable=not sys.stderr.isatty(), leave=False) as bar:
        while process.poll() is None:
            time.sleep(_POLL_SECONDS)
            now = time.monotonic()
            if trouble := read_trouble(parts):
                raise LowYieldError(trouble)
            seen, succeeded, reasons = _progress(parts)
            bar.update(seen - bar.n)
            state = (seen, sum(entry.stat().st_size for entry in os.scandir(parts) if entry.is_file()))
            if state != last_state:
                last_state, last_change = state, now
            if seen >= _EARLY_CHECK_URLS and succeeded < options.min_yield * seen:
                raise LowYieldError(_yield_message(succeeded, seen, reasons, options))
            if now - last_change > max(options.stall_seconds, 6 * options.timeout * (options.retries + 1)):
                raise PrepError(f"download stalled after {seen} of {urls} URLs; run the same command to resume")
            if options.deadline_seconds is not None and now - started > options.deadline_seconds:
                raise PrepError(f"deadline passed after {seen} of {urls} URLs; run the same command to resume")
    if trouble := read_trouble(parts):
        raise LowYieldError(trouble)
    if process.returncode != 0 and _progress(parts)[0] < urls:
        log = parts.parent / "img2dataset.log"
        last_line = log.read_text(errors="replace").strip().rsplit("\n", 1)[-1]
        raise PrepError(f"img2dataset failed ({last_line}); see {log}")


def _end_group(process: subprocess.Popen) -> None:
    """End the downloader's processes; they were started as one group by us."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # all of them have ended
    process.wait()


def _stats(parts: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(parts.glob("*_stats.json")):
        try:
            yield path, json.loads(path.read_text())
        except ValueError:
            continue  # being written at this moment; the next poll reads it


def _progress(parts: Path) -> tuple[int, int, Counter[str]]:
    """URLs tried, images received, failures by reason, over the finished parts."""
    seen = succeeded = 0
    reasons: Counter[str] = Counter()
    for _, stats in _stats(parts):
        seen += stats["count"]
        succeeded += stats["successes"]
        for message, count in stats["status_dict"].items():
            if message != "success":
                reasons[failure_reason(message)] += count
    return seen, succeeded, reasons


def _drop_failed_parts(parts: Path, min_yield: float) -> None:
    """Delete parts that are unfinished or yielded too little (by a lost network, say), to download them again."""
    finished = {path.name.split("_")[0]: stats for path, stats in _stats(parts)}
    for path in parts.iterdir():
        stats = finished.get(re.split(r"[._]", path.name)[0])
        if stats is None or stats["successes"] < min_yield * stats["count"]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _yield_message(succeeded: int, seen: int, reasons: Counter[str], options: FetchOptions) -> str:
    share = f"{succeeded} of {seen} URLs ({succeeded / seen:.1%}) could be downloaded, --min-yield is"
    advice = diagnose(reasons | Counter(success=succeeded), {}) or "check network and proxy, or lower it"
    return f"only {share} {options.min_yield:.1%}: {describe_counts(reasons)}; {advice}"


def results(plan: Plan) -> Iterator[Record | Rejection]:
    """Every row of the plan as a Record or a Rejection; those refused before the download come first."""
    with open(plan.work / "rejected.jsonl", encoding="utf-8") as stream:
        for line in stream:
            yield Rejection(**json.loads(line))
    part, rows = 0, []
    with pyarrow.parquet.ParquetFile(plan.work / "urls.parquet") as table:
        for batch in table.iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                rows.append(row)
                if len(rows) == plan.rows_per_part:
                    yield from _part_results(plan.work / "parts", part, rows)
                    part, rows = part + 1, []
    if rows:
        yield from _part_results(plan.work / "parts", part, rows)


def _part_results(parts: Path, part: int, rows: list[dict[str, Any]]) -> Iterator[Record | Rejection]:
    report = pyarrow.parquet.read_table(parts / f"{part:05d}.parquet", columns=["row", "key", "error_message"])
    outcome = {entry["row"]: entry for entry in report.to_pylist()}
    with tarfile.open(parts / f"{part:05d}.tar") as tar:
        members = {member.name: member for member in tar if member.isreg()}
        for row in rows:
            name = f"row {row['row']}: {row['url'][:200]}"
            entry = outcome.get(row["row"])
            member = None if entry is None else members.get(f"{entry['key']}.jpg")
            if entry is not None and entry["error_message"] is not None:
                message, lost = entry["error_message"], len(row["captions"])
                yield Rejection(failure_reason(message), name, message[:200], rows=lost)
            elif member is None:
                yield Rejection("lost_by_downloader", name, rows=len(row["captions"]))
            else:
                stream = tar.extractfile(member)
                assert stream is not None
                meta = {"url": row["url"], **json.loads(row["extra"])}
                yield Record(f"{row['row']:09d}", (stream.read(),), tuple(row["captions"]), meta)
