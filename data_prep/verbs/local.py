"""The verb that makes a corpus of own pictures: a folder or archive of images, and captions in whatever form."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from data_prep.annotations.annotated import AnnotatedSplit, records
from data_prep.image_places import open_places
from data_prep.manifest import Manifest
from data_prep.options.dry_run import add_dry_run, plan_images
from data_prep.options.shared import add_filters, add_writing, limits_of, local_path, name_list, share, split_writer
from data_prep.own_pictures.caption_files import open_captions
from data_prep.own_pictures.folders import captions_among
from data_prep.own_pictures.gathering import Gathered, annotated_splits, gather, read_contents, split_pictures
from data_prep.own_pictures.image_names import ImageNames
from data_prep.own_pictures.telling import next_commands, nothing_usable, refused_lines, rejections_of, rows_of
from data_prep.own_pictures.writing import arguments_of, standing, written_together
from data_prep.parallel import Workers
from data_prep.prepare import fill_split, start_workers
from data_prep.record import PrepError, Rejection

_MANY = 200  # pictures, for which all processes are needed


def run_local(args: argparse.Namespace) -> int:
    if args.dev_share + args.test_share >= 1:
        raise PrepError(
            f"--dev-share {args.dev_share:g} and --test-share {args.test_share:g} leave nothing to train on"
        )
    if len(args.columns) == 1:
        raise PrepError(f"--columns {args.columns[0]}: one name, expected IMAGE,CAPTION (or more captions)")
    with Workers(args.workers) as workers:
        return _run_local(args, workers)


def _run_local(args: argparse.Namespace, workers: Workers) -> int:
    with open_places([args.images]) as places:
        names = ImageNames(args.images, found := places.names())
        if args.captions is None:
            sources = captions_among(args.images, places, found, args.columns)
        else:
            sources = [open_captions(args.captions, args.columns)]
        gathered = gather(sources, names)
        if not args.dry_run and len(gathered.pictures) > _MANY:
            start_workers(workers)
        read_contents(gathered, places, limits_of(args))
        shares = {"dev": args.dev_share, "test": args.test_share}
        told = split_pictures(gathered, shares, args.seed, places, limits_of(args))
    print(*(f"captions: {source.told}" for source in sources), sep="\n")
    splits = annotated_splits(gathered)
    if not splits:
        raise PrepError(nothing_usable(sources, names, gathered, args.images))
    counts = ", ".join(f"{one.split} {len(one.images):,}" for one in splits)
    print(f"images: {len(gathered.pictures):,} of {len(names.images):,} have captions; splits ({told}): {counts}")
    if args.dry_run:
        print(*refused_lines(gathered.problems, names), sep="\n", end="\n" if gathered.problems else "")
        return plan_images(args, [(args.output / one.split, one, [args.images]) for one in splits])
    options = ("dev_share", "test_share", "seed", "samples_per_shard", "drop_duplicates")
    asked = {name: getattr(args, name) for name in options}
    arguments = {**arguments_of(sources, gathered, splits), **asked, **limits_of(args).__dict__}
    if (known := standing(args.output, arguments, args.overwrite)) is not None:
        print(f"{args.output}: prepared from these captions and images already; nothing to do")
        refused: list[Rejection] = []
    else:
        known, refused = _write(args, splits, arguments, gathered, workers)
    for line in refused_lines(refused, names):
        print(line)
    for split, manifest in known.items():
        print(f"{args.output / split}: {manifest.samples:,} images, {manifest.rows:,} captions")
    print("next:", *next_commands(args.output, known), sep="\n  ")
    return 0


def _write(
    args: argparse.Namespace,
    splits: list[AnnotatedSplit],
    arguments: dict[str, Any],
    gathered: Gathered,
    workers: Workers,
) -> tuple[dict[str, Manifest], list[Rejection]]:
    """All splits, and what was refused on the way."""
    limits, known, refused = limits_of(args), {}, []
    with written_together(args.output) as (beside, publish):
        for one in splits:
            writer = split_writer(
                args, beside, one.split, arguments, ("pillow",), corpus_name=args.output.resolve().name
            )
            source, total = records(one, [args.images]), len(one.images)
            known[one.split] = fill_split(
                writer, source, limits, workers, args.drop_duplicates, total=total, label=one.split
            )
            refused += rejections_of(beside / one.split, rows_of(one, gathered))
        publish()
    return known, refused


def add_local(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--images", type=local_path, required=True, help="folder, zip or tar of the pictures")
    told = "CSV, TSV, JSON, JSONL, parquet (default: metadata.csv in the folder, or NAME.txt beside NAME.jpg)"
    add("--captions", type=local_path, help=told)
    add("--columns", type=name_list, default=[], help="of image and caption, as file,caption; 1,2 without a header")
    add("--output", type=local_path, default=Path("data/local"), help="corpus folder")
    add("--dev-share", type=share, default=0.1, help="of the pictures, held out to look at while training")
    add("--test-share", type=share, default=0.0, help="of the pictures, held out for a last score")
    add("--seed", type=int, default=0, help="which pictures are held out")
    add_dry_run(parser)
    add_filters(parser)
    add_writing(parser)
