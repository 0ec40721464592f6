"""The verb that prepares Flickr8k from its files."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_prep.passport import source_files
from data_prep.prepare import fill_split
from data_prep.record import PrepError
from data_prep.shard_writer import refuse_existing
from data_prep.sources import flickr8k
from data_prep.verbs.options import (
    add_filters,
    add_writing,
    limits_of,
    local_path,
    report_split,
    split_writer,
)


def run_flickr8k(args: argparse.Namespace) -> int:
    images = args.images or next(
        (args.input / name for name in ("images", "Flicker8k_Dataset", "Images") if (args.input / name).is_dir()), None
    )
    if images is None or not images.is_dir():
        raise PrepError(f"{images or args.input / 'images'}: no folder of images; give it by --images")
    caption_file = args.captions or args.input / "Flickr8k.token.txt"
    captions, problems = flickr8k.read_flickr8k_captions(caption_file)
    lists = {split: args.input / name for split, name in flickr8k.FLICKR8K_SPLITS.items()}
    found = {split: path for split, path in lists.items() if path.is_file()}
    if not found:
        raise PrepError(f"{args.input}: none of the split lists {', '.join(p.name for p in lists.values())}")
    for split in found:
        refuse_existing(args.output / split, args.overwrite)
    for split, path in found.items():
        names = flickr8k.read_names(path)
        arguments = {"list": path.name, "files": source_files([caption_file, path]), **limits_of(args).__dict__}
        writer = split_writer(args, args.output, split, arguments, ("pillow",))
        records = flickr8k.flickr8k_records(images, captions, names)
        # An unreadable line belongs to no split; it is counted in the split with most captions.
        extra = problems if split == next(iter(found)) else []
        source = (item for part in (extra, records) for item in part)
        manifest = fill_split(
            writer, source, limits_of(args), args.workers, args.drop_duplicates, total=len(names), label=split
        )
        report_split(args.output / split, manifest)
    return 0


def add_flickr8k(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input", type=local_path, required=True, help="folder: images/, Flickr8k.token.txt, split lists"
    )
    parser.add_argument("--images", type=local_path, help="folder of the images, where it is another one")
    parser.add_argument("--captions", type=local_path, help="file of the captions, where it is another one")
    parser.add_argument("--output", type=local_path, default=Path("data/flickr8k"), help="corpus folder")
    add_filters(parser)
    add_writing(parser)
