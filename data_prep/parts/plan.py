"""The plan of a split that is made in parts: what was asked for, and the rows of each part, beside the split."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import stat
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from data_prep.filters import Limits, safe_key
from data_prep.manifest import Manifest, is_split, load_manifest, sync_directory, write_atomically, write_manifest
from data_prep.record import PrepError, Rejection, UrlRow
from data_prep.shard_writer import REJECTED_NAME, rejected_line

FORMAT = 1
ROWS_PER_PART = 5000
FOLDERS = ("rows", "claims", "attempts", "done", "failed", "logs")
PLAN_NAME = "plan.json"
_SCHEMA = pyarrow.schema(
    [("url", "string"), ("row", "int64"), ("captions", pyarrow.list_(pyarrow.string())), ("extra", "string")]
)


@dataclass(frozen=True)
class Recipe:
    """All that the content of a split depends on, besides what servers answer: equal recipes give equal bytes.

    ``request`` says where the rows come from; ``rows_per_part`` rows are one unit of work.
    """

    corpus: str
    split: str
    request: dict[str, Any]
    limits: dict[str, Any]
    provenance: dict[str, Any]
    samples_per_shard: int = 2000
    rows_per_part: int = ROWS_PER_PART
    drop_duplicates: bool = False

    @property
    def filters(self) -> Limits:
        return Limits(**self.limits)

    def key(self, row: int) -> str:
        """The key of a row of the input: with the split's name, so that keys of two splits differ."""
        return f"{safe_key(self.split)}_{row:09d}"


@dataclass(frozen=True)
class Plan:
    """A folder ``.SPLIT.parts`` with ``parts`` parts of ``urls`` addresses in all; ``rejected`` counts the rows that
    are given up before the download. ``base`` is the manifest of the split that the parts are added to, if any, and
    ``replaces`` the fingerprint of one in whose place they are put."""

    folder: Path
    recipe: Recipe
    parts: int
    urls: int
    rejected: dict[str, int]
    base: Manifest | None = None
    replaces: str | None = None

    @property
    def split_dir(self) -> Path:
        return self.folder.parent / self.recipe.split

    def table(self, number: int) -> Path:
        """The parquet file with the rows of a part."""
        return self.folder / "rows" / f"{number:05d}.parquet"

    def done(self, number: int) -> Path:
        """The folder of a part that is made."""
        return self.folder / "done" / f"{number:05d}"

    def failure(self, number: int) -> Path:
        """The file that says why a part was not made."""
        return self.folder / "failed" / f"{number:05d}.json"

    def log(self, number: int) -> Path:
        return self.folder / "logs" / f"{number:05d}.log"

    def is_done(self, number: int) -> bool:
        return (self.done(number) / "part.json").is_file()


def plan_folder(split_dir: Path) -> Path:
    return split_dir.parent / f".{split_dir.name}.parts"


def make_plan(
    split_dir: Path,
    recipe: Recipe,
    rows: Iterable[UrlRow | Rejection],
    kept: Iterable[str] = (),
    base: Path | None = None,
) -> Plan:
    """Write the plan of a split, or keep the one that is there; of several processes at once, one succeeds.

    ``kept`` are lines that ``rejected.jsonl`` begins with, and ``base`` the split that is added to. Raises PrepError
    where there is a plan of another recipe.
    """
    folder = plan_folder(split_dir)
    if folder.exists() or folder.is_symlink():
        return same_plan(folder, recipe)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:12]}")
    beside.mkdir()
    try:  # an unreadable table or Ctrl-C: a half-written plan must not stay
        _write_plan(beside, recipe, rows, kept, base, split_dir)
        os.rename(beside, folder)
        sync_directory(folder.parent)
    except OSError:
        if not folder.is_dir():  # another process was faster
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return same_plan(folder, recipe)


def same_plan(folder: Path, recipe: Recipe) -> Plan:
    """The plan in ``folder``; raises PrepError if it is of another recipe."""
    plan = open_plan(folder)
    if other := _differences(plan, recipe):
        raise PrepError(
            f"{folder}: parts of another input or other options ({', '.join(other)}); give --restart to drop them"
        )
    return plan


def drop_fruitless_plan(folder: Path, recipe: Recipe) -> None:
    """Drop a plan of another recipe of which no part is made or being made: a run that came to nothing must not stand
    in the way of the next. Of tasks that begin at the same time this is not for one to judge."""
    if not folder.is_dir() or folder.is_symlink():
        return
    plan = open_plan(folder)
    is_idle = not any(os.listdir(folder / name) for name in ("done", "claims"))
    if plan.base is None and is_idle and _differences(plan, recipe):
        drop_plan(folder)


def _differences(plan: Plan, recipe: Recipe) -> list[str]:
    """What of a plan's recipe is another one in ``recipe``; a newer Python goes on with the same parts."""
    known, asked = asdict(plan.recipe), json.loads(json.dumps(asdict(recipe)))
    for one in (known, asked):
        one["provenance"].pop("versions", None)
    return sorted(name for name in asked if known[name] != asked[name])


def open_plan(folder: Path) -> Plan:
    """The plan in ``folder``; raises PrepError for anything that was not made here: links, foreign files."""
    for path in (folder, *(folder / name for name in FOLDERS)):
        _must_be(path, stat.S_ISDIR, "folder")
    _must_be(folder / PLAN_NAME, stat.S_ISREG, "file")
    try:
        stored = json.loads((folder / PLAN_NAME).read_bytes())
        if stored["format"] != FORMAT:
            raise ValueError(f"format {stored['format']!r}, this program reads {FORMAT}")
        base = load_manifest(folder / "base") if stored["base"] else None
        recipe = Recipe(**stored["recipe"])
        counts = int(stored["parts"]), int(stored["urls"]), dict(stored["rejected"])
        return Plan(folder, recipe, *counts, base, stored["replaces"])
    except (ValueError, KeyError, TypeError) as error:
        raise PrepError(f"{folder}: no plan of parts ({error}); give --restart to drop it") from error


def _must_be(path: Path, is_kind: Any, kind: str) -> None:
    try:
        found = os.lstat(path).st_mode
    except FileNotFoundError:
        raise PrepError(f"{path}: missing, expected a {kind} of a plan; give --restart to drop it") from None
    if not is_kind(found):
        what = "a link" if stat.S_ISLNK(found) else "something else"
        raise PrepError(f"{path}: {what}, expected a {kind}; remove it")


def forget_failures(plan: Plan) -> None:
    """At the start of a run: what failed before is tried again."""
    for name in os.listdir(plan.folder / "failed"):
        (plan.folder / "failed" / name).unlink(missing_ok=True)


def drop_plan(folder: Path) -> None:
    """Remove a plan with its parts, and what plans that were not finished have left; a link in its place is removed,
    not followed."""
    if folder.is_symlink():
        folder.unlink()
    with contextlib.suppress(FileNotFoundError):  # in one step: half a plan would be none
        os.rename(folder, folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:12]}"))
    for left in folder.parent.glob(f"{glob.escape(folder.name)}.*"):
        shutil.rmtree(left, ignore_errors=True)


def _write_plan(
    folder: Path,
    recipe: Recipe,
    rows: Iterable[UrlRow | Rejection],
    kept: Iterable[str],
    base: Path | None,
    split_dir: Path,
) -> None:
    for name in FOLDERS:
        (folder / name).mkdir()
    counts: Counter[str] = Counter()
    with open(folder / REJECTED_NAME, "w", encoding="utf-8") as rejected:
        for line in kept:
            rejected.write(line)
            entry = json.loads(line)
            counts[entry["reason"]] += entry["rows"]
        parts = urls = 0
        for part in _parts(rows, recipe.rows_per_part, counts, rejected):
            with open(folder / "rows" / f"{parts:05d}.parquet", "wb") as stream:
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part, _SCHEMA), stream)
                stream.flush()
                os.fsync(stream.fileno())
            parts, urls = parts + 1, urls + len(part)
        rejected.flush()
        os.fsync(rejected.fileno())
    if base is not None:
        (folder / "base").mkdir()
        write_manifest(folder / "base", load_manifest(base))
    content = {"format": FORMAT, "recipe": asdict(recipe), "parts": parts, "urls": urls}
    content |= {"rejected": dict(sorted(counts.items())), "base": base is not None, "replaces": None}
    if base is None and is_split(split_dir):
        content["replaces"] = load_manifest(split_dir).fingerprint()
    write_atomically(folder / PLAN_NAME, json.dumps(content, indent=1) + "\n")


def _parts(
    rows: Iterable[UrlRow | Rejection], size: int, counts: Counter[str], rejected: Any
) -> Iterator[list[dict[str, Any]]]:
    """The rows to download in parts of ``size``; the last two are equally long where the last would be a small rest,
    whose yield would say little."""
    held: list[dict[str, Any]] = []
    for row in rows:
        if isinstance(row, Rejection):
            counts[row.reason] += row.rows
            rejected.write(rejected_line(row))
            continue
        captions = list(row.captions)
        held.append({"url": row.url, "row": row.number, "captions": captions, "extra": json.dumps(row.extra)})
        if len(held) == 2 * size:
            yield held[:size]
            held = held[size:]
    cut = len(held) if len(held) <= size else size if 2 * len(held) >= 3 * size else -(-len(held) // 2)
    for part in (held[:cut], held[cut:]):
        if part:
            yield part
