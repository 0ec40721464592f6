"""The verbs of captioned images with annotation files: COCO, Flickr30k, nocaps, Visual Genome's regions."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from data_prep.annotations.annotated import AnnotatedSplit
from data_prep.annotations.coco_form import read_coco_captions
from data_prep.annotations.karpathy import read_karpathy
from data_prep.annotations.nocaps import read_nocaps
from data_prep.annotations.published import compare
from data_prep.annotations.visual_genome import read_regions
from data_prep.filters import Limits, check_record
from data_prep.options.downloads import begin, download_rows
from data_prep.options.dry_run import plan_download
from data_prep.options.shared import Verb, limits_of, local_path, plain_name
from data_prep.passport import source_files
from data_prep.record import PrepError, Record, Rejection, UrlRow
from data_prep.verbs.annotation import Part, add_options, coco_held_out, prepare_parts


def run_coco(args: argparse.Namespace) -> int:
    if (args.karpathy is None) == (not args.captions):
        raise PrepError("which captions: give Karpathy's file by --karpathy, or COCO's own by --captions")
    if args.karpathy is not None:
        if args.download:
            raise PrepError("--download: Karpathy's file has no addresses; give COCO's own files by --captions")
        splits = read_karpathy(args.karpathy, "coco", restval=not args.without_restval)
        published = {"train": "train, without restval"} if args.without_restval else {}
        parts = [Part(args.output, split, args.images, "coco", published.get(split.split, "")) for split in splits]
        return prepare_parts(args, parts, [args.karpathy])
    held_out = set().union(*map(coco_held_out, args.held_out))
    named = [read_coco_captions(path, held_out) for path in args.captions]
    if len({split.split for _, split in named}) < len(named):
        found = ", ".join(f"{name} is {split.split}" for name, split in named)
        raise PrepError(f"--captions: two files of one split ({found}); prepare 2014 and 2017 as corpora of their own")
    parts = [Part(args.output, split, args.images, "coco captions", name) for name, split in named]
    return _prepare(args, parts, [*args.captions, *args.held_out])


def add_coco(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--karpathy", type=local_path, help="dataset_coco.json, Karpathy's splits")
    add("--captions", type=local_path, nargs="+", default=[], help="captions_{train,val}{2014,2017}.json, COCO's own")
    add("--without-restval", action="store_true", help="Karpathy's: train on train2014 alone, 82,783 images")
    _add_held_out(parser)
    _add_download(parser)
    add_options(parser, "data/coco", "COCO's images (train2014 and val2014, or the folder of both)", downloads=True)


def run_vg(args: argparse.Namespace) -> int:
    if not args.held_out and not args.keep_held_out:
        raise PrepError(
            "half of Visual Genome's images are COCO's, held-out ones among them: give --held-out dataset_coco.json, "
            "or --keep-held-out to train on them"
        )
    held_out = set().union(*map(coco_held_out, args.held_out))
    annotated = read_regions(args.regions, args.image_data, held_out)
    files = [args.regions, args.image_data, *args.held_out]
    return _prepare(args, [Part(args.output, annotated, args.images, "vg")], files)


def add_vg(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--regions", type=local_path, required=True, help="region_descriptions.json")
    add("--image-data", type=local_path, required=True, help="image_data.json, which names its images of COCO")
    _add_held_out(parser)
    add("--keep-held-out", action="store_true", help="keep COCO's held-out images")
    _add_download(parser)
    add_options(parser, "data/vg", "VG_100K and VG_100K_2, or images.zip and images2.zip", downloads=True)


def _add_held_out(parser: argparse.ArgumentParser) -> None:
    told = "leave out the held-out images of COCO in these files: Karpathy's, or VQAv2 questions"
    parser.add_argument("--held-out", type=local_path, nargs="+", default=[], help=told)


def _add_download(parser: argparse.ArgumentParser) -> None:
    told = "download the images by the addresses in the annotation files, instead of --images"
    parser.add_argument("--download", action="store_true", help=told)


def _prepare(args: argparse.Namespace, parts: list[Part], files: list[Path]) -> int:
    if not args.download:
        return prepare_parts(args, parts, files)
    if args.images:
        raise PrepError("--download and --images: give one of them")
    if args.drop_duplicates:
        raise PrepError("--drop-duplicates: not with --download here, since captions have ids and boxes beside them")
    sources = source_files(files)
    for part in parts:
        split, published = part.annotated, part.published or part.annotated.split
        print(f"{part.set_name} {split.split}: {compare(part.set_name, published, split.counts)}")
        of_part = argparse.Namespace(**{**vars(args), "split": split.split})
        rows = _rows_to_download(split, limits_of(args))
        if args.check:
            continue
        if args.dry_run:
            plan_download(of_part, part.set_name, published, rows)
            continue
        begin(of_part)
        download_rows(of_part, rows, {"corpus": part.set_name, "split": split.split, "files": sources})
    return 0


def _rows_to_download(annotated: AnnotatedSplit, limits: Limits) -> Iterator[UrlRow | Rejection]:
    """A row for each image that has an address; captions that the filters would drop are left out here, with what
    stands beside them."""
    yield from annotated.problems
    for number, image in enumerate(annotated.images):
        texts = Record(image.key, (), tuple(image.captions), per_caption=image.per_caption)
        kept, rejections = check_record(texts, limits)
        yield from rejections
        if kept is None:
            continue
        if not image.url.lower().startswith(("http://", "https://")):
            yield Rejection("bad_url", image.key, "no address in the annotation files", rows=len(kept.captions))
            continue
        extra = {**image.meta, "image_identities": list(image.identities), **kept.per_caption}
        yield UrlRow(number, image.url, kept.captions, extra)


def run_flickr30k(args: argparse.Namespace) -> int:
    splits = read_karpathy(args.karpathy, "flickr30k")
    parts = [Part(args.output, split, args.images, "flickr30k") for split in splits]
    return prepare_parts(args, parts, [args.karpathy])


def add_flickr30k(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--karpathy", type=local_path, required=True, help="dataset_flickr30k.json")
    add_options(parser, "data/flickr30k", "Flickr30k's images (flickr30k_images)")


def run_nocaps(args: argparse.Namespace) -> int:
    annotated = read_nocaps(args.input, args.split)
    return prepare_parts(args, [Part(args.output, annotated, args.images, "nocaps")], [args.input])


def add_nocaps(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", type=local_path, required=True, help="nocaps_val_4500_captions.json")
    parser.add_argument("--split", type=plain_name, default="dev", help="name of the split")
    add_options(parser, "data/nocaps", "images of Open Images' validation split, like 0013ea2087020901.jpg")


CAPTION_VERBS: dict[str, Verb] = {
    "coco": ("prepare COCO's captions, in Karpathy's splits or its own", add_coco, run_coco),
    "vg": ("prepare Visual Genome's region descriptions", add_vg, run_vg),
    "flickr30k": ("prepare Flickr30k's captions in Karpathy's splits", add_flickr30k, run_flickr30k),
    "nocaps": ("prepare nocaps' captions from its file and Open Images' images", add_nocaps, run_nocaps),
}
