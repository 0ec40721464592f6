"""The verb that downloads a table of URLs."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from data_prep.options.downloads import add_download, begin, download_rows
from data_prep.options.dry_run import add_dry_run, plan_download
from data_prep.options.shared import (
    local_path,
    name_list,
    plain_name,
    table_path,
)
from data_prep.passport import source_files
from data_prep.sources import url_table
from data_prep.sources.tables import FORMATS, table_files
from data_prep.stores.address import Address
from data_prep.stores.local_copies import fetch_tables


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
    add_download(parser)
    add_dry_run(parser)
