"""How every verb downloads: its options, its split as parts on any engine, what an earlier run left."""

from __future__ import annotations

import argparse
import os
import uuid
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from data_prep.downloading.courtesy import Courtesy
from data_prep.downloading.fetch import FetchOptions
from data_prep.manifest import Manifest, is_split, load_manifest
from data_prep.options.courtesy import add_courtesy
from data_prep.options.shared import (
    add_filters,
    add_writing,
    from_arguments,
    limits_of,
    positive_number,
    report_split,
    share,
    whole_number,
)
from data_prep.parallel import default_workers
from data_prep.parts.engines import ENGINES, MpiPool, make_by_mpi, make_by_spark, make_parts
from data_prep.parts.part import PartOptions
from data_prep.parts.plan import (
    ROWS_PER_PART,
    Plan,
    Recipe,
    drop_fruitless_plan,
    drop_plan,
    forget_failures,
    make_plan,
    open_plan,
    plan_folder,
    same_plan,
)
from data_prep.parts.progress import Watch, WatchOptions, parts_failed, too_low
from data_prep.parts.retry import failed_rows
from data_prep.parts.seal import is_open, seal
from data_prep.prepare import provenance
from data_prep.record import LowYieldError, PrepError, Rejection, UrlRow
from data_prep.shard_writer import refuse_existing


def download_rows(args: argparse.Namespace, rows: Iterable[UrlRow | Rejection], request: dict[str, Any]) -> int:
    """Make the split ``args.split`` of ``rows``; ``request`` says where they come from, and is the same when the same
    command runs again. ``args`` has the options of ``add_download``."""
    split_dir = args.output / args.split
    recipe = _recipe(args, request)
    if args.retry_failed:
        plan = _plan_again(split_dir, recipe)
        if plan is None:
            print(f"{split_dir}: no URL failed for a reason that can change")
            return 0
    elif is_split(split_dir) and not args.overwrite:
        manifest = load_manifest(split_dir)
        if manifest.provenance.get("arguments") != recipe.provenance["arguments"]:
            refuse_existing(split_dir, overwrite=False)
        drop_plan(plan_folder(split_dir))  # another task of the array, or a run that was ended in its last moment
        report_split(split_dir, manifest)
        return 0
    else:
        if args.engine != "array":
            drop_fruitless_plan(plan_folder(split_dir), recipe)
        plan = make_plan(split_dir, recipe, rows)
    before = 0 if plan.base is None else plan.base.rows
    manifest = _make(args, plan)
    if manifest is not None:
        report_split(split_dir, manifest)
        if args.retry_failed:
            print(f"{split_dir}: {manifest.rows - before} rows more than before")
    return 0


def _recipe(args: argparse.Namespace, request: dict[str, Any]) -> Recipe:
    limits = limits_of(args).__dict__
    return Recipe(
        args.output.resolve().name,
        args.split,
        request,
        limits,
        provenance(f"data_prep {args.verb}", {**request, **limits}, ("img2dataset", "pillow")),
        args.samples_per_shard,
        args.rows_per_part,
        args.drop_duplicates,
    )


def _make(args: argparse.Namespace, plan: Plan) -> Manifest | None:
    """Make the parts of a plan and seal the split; None where other tasks of an array still work on some."""
    least = 0.0 if args.retry_failed else args.min_yield
    options = PartOptions(
        uuid.uuid4().hex, from_arguments(FetchOptions, args, courtesy=from_arguments(Courtesy, args)), least
    )
    stall = max(args.stall_seconds, 6 * args.timeout * (args.retries + 1))
    try:
        forget_failures(plan)
        watch = Watch(plan, WatchOptions(least, stall, args.deadline_seconds))
        if args.engine == "mpi":
            make_by_mpi(plan, options, watch, args.mpi_pool)
        elif args.engine == "spark":
            make_by_spark(plan, options, watch, args.processes)
        else:
            make_parts(plan, options, watch, args.processes, _array(args))
    except (PrepError, OSError):
        if is_open(plan):  # else another task of the array has made the split of all parts
            raise
    if is_open(plan):
        state = watch.look()
        if state.trouble is not None:
            raise LowYieldError(state.trouble)
        if state.failed:
            raise parts_failed(plan, {number: watch.failure(number) or {} for number in state.failed}, least)
        if len(state.done) < plan.parts:
            print(f"{plan.split_dir}: other tasks make the last parts; the one that ends last makes the split of them")
            return None
        if args.retry_failed and not state.downloaded:
            drop_plan(plan.folder)
            raise too_low(state, 0.0)
    return seal(plan, least)


def _plan_again(split_dir: Path, recipe: Recipe) -> Plan | None:
    """The plan of downloading what failed; that of an earlier run is gone on with. None where there is nothing."""
    known, folder = load_manifest(split_dir), plan_folder(split_dir)
    if folder.exists():
        known = open_plan(folder).base or known
    asked, found = recipe.provenance["arguments"], known.provenance.get("arguments", {})
    if asked != found:
        other = ", ".join(sorted(name for name in {*asked, *found} if asked.get(name) != found.get(name)))
        raise PrepError(f"{split_dir}: prepared with other options or files ({other}); give those of that time")
    recipe = replace(recipe, request={**recipe.request, "again": known.fingerprint()}, provenance=known.provenance)
    if folder.exists():
        return same_plan(folder, recipe)
    rows, others = failed_rows(split_dir)
    return make_plan(split_dir, recipe, rows, others, split_dir) if rows else None


def begin(args: argparse.Namespace) -> None:
    """Refuse what is prepared already, before a table is read; with ``--restart`` forget an unfinished download.

    With ``--engine mpi`` only the first process comes back from here: the others make parts until it ends.
    """
    split_dir = args.output / args.split
    if args.engine == "mpi":
        args.mpi_pool = _mpi_pool()
    if args.engine == "array":
        _array(args)
        if args.overwrite or args.restart:
            raise PrepError("an array starts its tasks one by one: remove the split yourself, without --overwrite")
    if args.retry_failed:
        if not is_split(split_dir):
            raise PrepError(f"{split_dir}: no finished split; run the command without --retry-failed first")
    elif args.engine == "array" or plan_folder(split_dir).exists():
        refuse_existing(split_dir, args.overwrite or is_split(split_dir))
    else:
        refuse_existing(split_dir, args.overwrite)
    if args.restart:
        drop_plan(plan_folder(split_dir))


@cache
def _mpi_pool() -> MpiPool:
    """One for all splits that a verb begins."""
    return MpiPool()


def _array(args: argparse.Namespace) -> tuple[int, int] | None:
    """Which task of how many this is, from 0."""
    if args.engine != "array":
        return None
    if args.array is not None:
        return args.array
    try:
        number, count, first, step = (
            int(os.environ[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "COUNT", "MIN", "STEP")
        )
    except (KeyError, ValueError):
        raise PrepError("--engine array outside of a Slurm array; give --array I/N, from 0/N to N-1/N") from None
    return (number - first) // step % count, count


def array_task(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r}, expected I/N with I from 0 to N-1")
    return int(number), int(count)


def add_download(parser: argparse.ArgumentParser) -> None:
    """The options of every verb that downloads."""
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="processes",
        help="what makes the parts of the split; see docs/downloading.md",
    )
    parser.add_argument("--array", type=array_task, help="task I of N of --engine array, as I/N; Slurm says it itself")
    parser.add_argument("--rows-per-part", type=positive_number, default=ROWS_PER_PART, help="one unit of work")
    parser.add_argument(
        "--processes", type=positive_number, default=min(16, default_workers()), help="parts at a time on a machine"
    )
    parser.add_argument("--threads", type=positive_number, default=32, help="downloads at a time in each process")
    parser.add_argument("--timeout", type=positive_number, default=10, help="seconds for a read; thrice for a download")
    parser.add_argument("--retries", type=whole_number, default=1, help="further tries of a failed download")
    parser.add_argument("--min-yield", type=share, default=0.1, help="fail below this share of usable rows")
    parser.add_argument("--stall-seconds", type=float, default=300, help="give up after so long without progress")
    parser.add_argument("--deadline-seconds", type=float, help="give up after so long in all; resume by running again")
    parser.add_argument(
        "--allow-private-addresses", action="store_true", help="download from one's own machine or network too"
    )
    parser.add_argument("--restart", action="store_true", help="forget an unfinished download")
    parser.add_argument(
        "--retry-failed", action="store_true", help="add to a finished split what can be had of URLs that failed"
    )
    add_courtesy(parser)
    add_filters(parser)
    add_writing(parser)
