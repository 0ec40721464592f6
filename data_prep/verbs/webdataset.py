"""The verb that takes in shards of another program."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_prep.foreign.choosing import Choice
from data_prep.foreign.inputs import download_statistics, find_shards
from data_prep.foreign.linked import link_split
from data_prep.foreign.records import copied_records
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
from data_prep.prepare import fill_split
from data_prep.record import PrepError
from data_prep.shard_writer import refuse_existing


def run_webdataset(args: argparse.Namespace) -> int:
    split_dir = args.output / args.split
    refuse_existing(split_dir, args.overwrite)
    if not args.copy and (args.image_size or args.image_format or args.drop_duplicates):
        raise PrepError("--image-size, --image-format and --drop-duplicates change shards; give --copy with them")
    shards = find_shards(args.input)
    choice = Choice(tuple(args.image_members), args.caption_member, args.caption_key)
    limits = limits_of(args)
    came = {"shards": {name: path.name for name, path in shards.items() if name != path.name}, "copy": args.copy}
    came |= {"input": [path.name for path in args.input], "number_of_shards": len(shards)}
    came |= download_statistics(list(shards.values()))
    writer = split_writer(
        args,
        args.output,
        args.split,
        {**came, **choice.__dict__, **limits.__dict__},
        ("pillow",),
        num_images=choice.num_images,
        caption_key=None if args.copy else choice.key_in_json,
    )
    if args.copy:
        records = copied_records(shards, args.split, choice, limits.max_image_bytes)
        manifest = fill_split(writer, records, limits, args.workers, args.drop_duplicates, label=args.split)
    else:
        manifest = link_split(writer, shards, args.split, choice, limits, args.workers)
    report_split(split_dir, manifest)
    return 0


def add_webdataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", type=local_path, nargs="+", required=True, help="tars, or folders of tars")
    parser.add_argument("--output", type=local_path, default=Path("data/webdataset"), help="corpus folder")
    parser.add_argument("--split", default="train", type=plain_name)
    parser.add_argument("--copy", action="store_true", help="write new shards; default: link to those that are there")
    parser.add_argument(
        "--image-members",
        type=name_list,
        default=[],
        help="what follows the key of a sample's images, as jpg or 0,1; default: a sample has one image",
    )
    parser.add_argument("--caption-member", help="what follows the key of the caption, as txt or caption.txt")
    parser.add_argument("--caption-key", help="of the JSON, before any text; default: caption, where there is no text")
    add_filters(parser)
    add_writing(parser)
