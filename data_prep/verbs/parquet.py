"""The verb that prepares parquet files which hold the images themselves."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_prep.options.dry_run import add_dry_run, plan_records
from data_prep.options.shared import (
    add_filters,
    add_writing,
    limits_of,
    local_path,
    name_list,
    plain_name,
    report_split,
    split_writer,
)
from data_prep.passport import source_files
from data_prep.prepare import fill_split
from data_prep.record import PrepError
from data_prep.shard_writer import refuse_existing
from data_prep.sources.embedded import embedded_columns, embedded_records
from data_prep.sources.tables import table_files


def run_parquet(args: argparse.Namespace) -> int:
    files = [file for path in args.input for file in table_files(path, "parquet")]
    columns = (args.image_column, args.caption_column, args.extra_columns)
    for path in files:
        if not path.name.lower().endswith(".parquet"):
            raise PrepError(f"{path}: expected a parquet file, or a folder of them")
        embedded_columns(path, *columns)
    source = embedded_records(files, args.split, *columns)
    if args.dry_run:
        return plan_records(args, args.output / args.split, source)
    refuse_existing(args.output / args.split, args.overwrite)
    arguments = {"files": source_files(files), "columns": list(columns), **limits_of(args).__dict__}
    writer = split_writer(args, args.output, args.split, arguments, ("pillow", "pyarrow"))
    manifest = fill_split(writer, source, limits_of(args), args.workers, args.drop_duplicates, label=args.split)
    report_split(args.output / args.split, manifest)
    return 0


def add_parquet(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input", type=local_path, nargs="+", required=True, help="parquet files of one split, or folders of them")
    add("--output", type=local_path, default=Path("data/parquet"), help="corpus folder")
    add("--split", default="train", type=plain_name)
    add("--image-column", default="image", help="its bytes, or a struct with a field bytes, as the hub has it")
    add("--caption-column", default="caption", help="a text, a list of them, or a path like sentences.raw")
    add("--extra-columns", type=name_list, default=[], help="kept in KEY.json, as A,B,...")
    add_dry_run(parser)
    add_filters(parser)
    add_writing(parser)
