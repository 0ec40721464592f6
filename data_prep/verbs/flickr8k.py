"""The verb that prepares Flickr8k from its files, in its authors' form or in Kaggle's."""

from __future__ import annotations

import argparse
from itertools import chain
from pathlib import Path

from data_prep.annotations.annotated import Annotated, AnnotatedSplit
from data_prep.image_places import open_places
from data_prep.options.dry_run import add_dry_run, plan_images
from data_prep.options.shared import (
    add_filters,
    add_writing,
    limits_of,
    local_path,
    report_split,
    share,
    split_writer,
)
from data_prep.prepare import fill_split
from data_prep.record import MissingInput, Rejection
from data_prep.shard_writer import refuse_existing
from data_prep.sources import flickr8k

_IMAGE_PLACES = ("images", "Flicker8k_Dataset", "Images", "Flickr8k_Dataset.zip", "Images.zip")


def run_flickr8k(args: argparse.Namespace) -> int:
    images = args.images or next((args.input / name for name in _IMAGE_PLACES if (args.input / name).exists()), None)
    if images is None or not images.exists():
        raise MissingInput(f"{images or args.input / 'images'}: no folder of images; give it or an archive by --images")
    captions, problems = _captions(args)
    splits, origin = _splits(args, captions)
    if args.dry_run:
        return _plan(args, splits, captions, problems, images)
    for split in splits:
        refuse_existing(args.output / split, args.overwrite)
    for split, names in splits.items():
        writer = split_writer(args, args.output, split, {**origin[split], **limits_of(args).__dict__}, ("pillow",))
        # An unreadable line belongs to no split; it is counted in the split with most captions.
        extra = problems if split == next(iter(splits)) else []
        with open_places([images]) as places:
            source = chain(extra, flickr8k.flickr8k_records(places, captions, names))
            manifest = fill_split(
                writer, source, limits_of(args), args.workers, args.drop_duplicates, total=len(names), label=split
            )
        report_split(args.output / split, manifest)
    return 0


def _plan(
    args: argparse.Namespace,
    splits: dict[str, list[str]],
    captions: dict[str, list[str]],
    problems: list[Rejection],
    images: Path,
) -> int:
    parts = []
    for split, names in splits.items():
        found = [Annotated(name, ((name,),), (), captions=captions.get(name, [])) for name in dict.fromkeys(names)]
        parts.append((args.output / split, AnnotatedSplit(split, found, [] if parts else problems, {}), [images]))
    return plan_images(args, parts)


def _captions(args: argparse.Namespace) -> tuple[dict[str, list[str]], list[Rejection]]:
    path = args.captions
    if path is None:
        known = [args.input / name for name in ("Flickr8k.token.txt", "captions.txt")]
        path = next((path for path in known if path.is_file()), known[0])
    if flickr8k.is_kaggle(path):
        return flickr8k.read_kaggle_captions(path)
    return flickr8k.read_flickr8k_captions(path)


def _splits(
    args: argparse.Namespace, captions: dict[str, list[str]]
) -> tuple[dict[str, list[str]], dict[str, dict[str, object]]]:
    """(names of each split, what the manifest says of where each comes from): the published lists, or where there are
    none, as in Kaggle's form, all images or a share of them drawn."""
    lists = {split: args.input / name for split, name in flickr8k.FLICKR8K_SPLITS.items()}
    found = {split: path for split, path in lists.items() if path.is_file()}
    if found:
        names = {split: flickr8k.read_names(path) for split, path in found.items()}
        return names, {split: {"list": path.name} for split, path in found.items()}
    if args.dev_share is None:
        expected = ", ".join(path.name for path in lists.values())
        raise MissingInput(
            f"{args.input}: none of the split lists {expected}; Kaggle's form has none: say which "
            "share of the images is for dev, --dev-share 0.1, or 0 to train on all"
        )
    names = flickr8k.drawn_splits(captions, args.dev_share, args.seed)
    drawn: dict[str, object] = {"dev_share": args.dev_share, "seed": args.seed}
    print(f"no split lists: {', '.join(f'{split} {len(found):,}' for split, found in names.items())} images, drawn")
    return names, dict.fromkeys(names, drawn)


def add_flickr8k(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    told = "folder: images/, Flickr8k.token.txt, split lists; or Kaggle's: Images/, captions.txt"
    add("--input", type=local_path, required=True, help=told)
    add("--images", type=local_path, help="folder, zip or tar of the images, where it is another one")
    add("--captions", type=local_path, help="file of the captions, where it is another one")
    add("--output", type=local_path, default=Path("data/flickr8k"), help="corpus folder")
    add("--dev-share", type=share, help="where there are no split lists: the images held out as dev; 0 trains on all")
    add("--seed", type=int, default=0, help="which images are held out by --dev-share")
    add_dry_run(parser)
    add_filters(parser)
    add_writing(parser)
