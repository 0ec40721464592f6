"""The verb that downloads a table of URLs."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_prep.downloading import fetch
from data_prep.downloading.courtesy import Courtesy
from data_prep.parallel import default_workers
from data_prep.passport import source_files
from data_prep.prepare import fill_split
from data_prep.record import Rejection, UrlRow
from data_prep.shard_writer import refuse_existing
from data_prep.sources import url_table
from data_prep.sources.tables import FORMATS, table_files
from data_prep.stores.address import Address
from data_prep.stores.local_copies import fetch_tables
from data_prep.verbs.courtesy import add_courtesy
from data_prep.verbs.dry_run import add_dry_run, plan_download
from data_prep.verbs.options import (
    add_filters,
    add_writing,
    from_arguments,
    limits_of,
    local_path,
    name_list,
    plain_name,
    positive_number,
    report_split,
    share,
    split_writer,
    table_path,
    whole_number,
)


def run_urls(args: argparse.Namespace) -> int:
    if not args.dry_run:
        begin(args)
    scratch = args.output / f".{args.split}.input"
    if isinstance(args.input, Address):
        args.input = fetch_tables(args.input, scratch)
    request = {
        "input": args.input.name,
        "files": source_files(table_files(args.input, args.format)),
        "columns": [args.url_column, args.caption_column, args.extra_columns, args.json_columns, args.columns],
        "format": args.format,
    }
    rows = url_table.url_rows(
        args.input,
        args.url_column,
        args.caption_column,
        args.extra_columns,
        args.json_columns,
        columns=args.columns,
        table_format=args.format,
    )
    code = plan_download(args, "urls", args.split, rows) if args.dry_run else download_rows(args, rows, request)
    shutil.rmtree(scratch, ignore_errors=True)
    return code


def download_rows(args: argparse.Namespace, rows: Iterable[UrlRow | Rejection], request: dict[str, Any]) -> int:
    """Make the split ``args.split`` of ``rows``; ``request`` says where they come from, and is the same when the same
    command runs again. ``args`` has the options of ``add_download``."""
    split_dir, work = args.output / args.split, _working_folder(args)
    plan = fetch.plan_download(work, request, rows, args.processes)
    fetch.download(plan, from_arguments(fetch.FetchOptions, args, courtesy=from_arguments(Courtesy, args)))
    writer = split_writer(
        args, args.output, args.split, {**request, **limits_of(args).__dict__}, ("img2dataset", "pillow")
    )
    manifest = fill_split(
        writer,
        fetch.results(plan),
        limits_of(args),
        args.workers,
        args.drop_duplicates,
        min_yield=args.min_yield,
        total=plan.urls,
        label=args.split,
    )
    shutil.rmtree(work)
    report_split(split_dir, manifest)
    return 0


def begin(args: argparse.Namespace) -> None:
    """Refuse what is prepared already, before a table is read; with ``--restart`` forget an unfinished download."""
    refuse_existing(args.output / args.split, args.overwrite)
    if args.restart:
        shutil.rmtree(_working_folder(args), ignore_errors=True)


def _working_folder(args: argparse.Namespace) -> Path:
    return args.output / f".{args.split}.download"


def add_urls(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        type=table_path,
        required=True,
        help="TSV, CSV, JSONL (.gz, .bz2, .zst too), parquet, or a folder of them; also s3://..",
    )
    parser.add_argument("--output", type=local_path, default=Path("data/urls"), help="corpus folder")
    parser.add_argument("--split", default="train", type=plain_name)
    parser.add_argument("--format", choices=FORMATS, help="of the input, where its suffix does not say")
    parser.add_argument("--columns", type=name_list, help="cells of a file without header line: caption,url for CC3M")
    parser.add_argument("--url-column", default="url")
    parser.add_argument("--caption-column", default="caption")
    parser.add_argument("--extra-columns", type=name_list, default=[], help="kept in KEY.json, as A,B,...")
    parser.add_argument("--json-columns", type=name_list, default=[], help="kept too, their cells parsed as JSON")
    add_dry_run(parser)
    add_download(parser)


def add_download(parser: argparse.ArgumentParser) -> None:
    """The options of every verb that downloads."""
    parser.add_argument("--processes", type=positive_number, default=min(16, default_workers()))
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
    add_courtesy(parser)
    add_filters(parser)
    add_writing(parser)
