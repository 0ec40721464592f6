"""The verbs of the command line: the options of each, and the function that runs it."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from data_prep import fetch, info, overlap, sources, synth, tokenizer
from data_prep.annotation_verbs import ANNOTATION_VERBS
from data_prep.filters import Limits
from data_prep.manifest import ManifestError, file_sha256, find_splits
from data_prep.parallel import default_workers
from data_prep.prepare import fill_split
from data_prep.record import PrepError
from data_prep.shard_writer import refuse_existing
from data_prep.tables import FORMATS, table_files
from data_prep.verb_options import (
    DATA,
    Verb,
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
    whole_number,
)
from data_prep.verify import verify_split
from data_prep.video_verbs import VIDEO_VERBS


def run_synth(args: argparse.Namespace) -> int:
    counts = {"train": args.train, "dev": args.dev, "test": args.test}
    options = from_arguments(synth.SynthOptions, args, counts=counts)
    if args.urls is not None:
        for table in synth.write_url_tables(args.urls, args.base_url, options):
            print(table)
        return 0
    for manifest in synth.write_corpora(args.output, options):
        report_split(args.output.parent / manifest.corpus / manifest.split, manifest)
    return 0


def add_synth(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=local_path, default=Path("data/synth"), help="corpus; pairs: OUTPUT_pairs")
    parser.add_argument("--train", type=whole_number, default=20000, help="training scenes")
    parser.add_argument("--dev", type=whole_number, default=1000, help="scenes of the dev split")
    parser.add_argument("--test", type=whole_number, default=1000, help="scenes of the test split")
    parser.add_argument("--image-size", type=positive_number, default=64, help="pixels a side")
    parser.add_argument("--captions-per-image", type=positive_number, default=1, help="the first is the canonical one")
    parser.add_argument("--pair-share", type=float, default=0.25, help="image pairs for each scene; 0 for none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--urls", type=local_path, metavar="DIR", help="write loose images and DIR/SPLIT.tsv instead")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000", help="where DIR will be served (with --urls)")
    add_writing(parser)


def run_urls(args: argparse.Namespace) -> int:
    split_dir = args.output / args.split
    refuse_existing(split_dir, args.overwrite)
    work = args.output / f".{args.split}.download"
    if args.restart:
        shutil.rmtree(work, ignore_errors=True)
    hashes = [file_sha256(file) for file in table_files(args.input, args.format)]
    request = {
        "input": args.input.name,
        "sha256": hashes[0] if args.input.is_file() else hashes,
        "columns": [args.url_column, args.caption_column, args.extra_columns, args.json_columns, args.columns],
        "format": args.format,
    }
    rows = sources.url_rows(
        args.input,
        args.url_column,
        args.caption_column,
        args.extra_columns,
        args.json_columns,
        columns=args.columns,
        table_format=args.format,
    )
    plan = fetch.plan_download(work, request, rows, args.processes)
    fetch.download(plan, from_arguments(fetch.FetchOptions, args))
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


def add_urls(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input", type=local_path, required=True, help="TSV, CSV, JSONL, parquet (.gz too), or a folder of them"
    )
    parser.add_argument("--output", type=local_path, default=Path("data/urls"), help="corpus folder")
    parser.add_argument("--split", default="train", type=plain_name)
    parser.add_argument("--format", choices=FORMATS, help="of the input, where its suffix does not say")
    parser.add_argument("--columns", type=name_list, help="cells of a file without header line: caption,url for CC3M")
    parser.add_argument("--url-column", default="url")
    parser.add_argument("--caption-column", default="caption")
    parser.add_argument("--extra-columns", type=name_list, default=[], help="kept in KEY.json, as A,B,...")
    parser.add_argument("--json-columns", type=name_list, default=[], help="kept too, their cells parsed as JSON")
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
    add_filters(parser)
    add_writing(parser)


def run_flickr8k(args: argparse.Namespace) -> int:
    images = args.images or next(
        (args.input / name for name in ("images", "Flicker8k_Dataset", "Images") if (args.input / name).is_dir()), None
    )
    if images is None or not images.is_dir():
        raise PrepError(f"{images or args.input / 'images'}: no folder of images; give it by --images")
    captions, problems = sources.read_flickr8k_captions(args.captions or args.input / "Flickr8k.token.txt")
    lists = {split: args.input / name for split, name in sources.FLICKR8K_SPLITS.items()}
    found = {split: path for split, path in lists.items() if path.is_file()}
    if not found:
        raise PrepError(f"{args.input}: none of the split lists {', '.join(p.name for p in lists.values())}")
    for split in found:
        refuse_existing(args.output / split, args.overwrite)
    for split, path in found.items():
        names = sources.read_names(path)
        writer = split_writer(args, args.output, split, {"list": path.name, **limits_of(args).__dict__}, ("pillow",))
        records = sources.flickr8k_records(images, captions, names)
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


def run_tokenizer(args: argparse.Namespace) -> int:
    splits = [split for path in args.data for split in _with_texts(path)]
    size = tokenizer.train_tokenizer(splits, args.output, args.vocab_size, args.overwrite)
    print(f"{args.output}: {size} tokens (asked for {args.vocab_size}) from {', '.join(map(str, splits))}")
    return 0


def _with_texts(path: Path) -> list[Path]:
    """Train splits of single images; of image pairs where there are no others."""
    try:
        return find_splits(path, "train", texts=None)
    except ManifestError:
        return find_splits(path, "train", num_images=None, texts=None)


def add_tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=local_path, nargs="+", default=DATA, help="train splits at or below these")
    parser.add_argument("--output", type=local_path, default=Path("data/tokenizer"))
    parser.add_argument("--vocab-size", type=positive_number, default=8192, help="at most; special tokens included")
    parser.add_argument("--overwrite", action="store_true")


def run_verify(args: argparse.Namespace) -> int:
    num_problems = 0
    for split_dir in [split for path in args.data for split in info.all_splits(path)]:
        found = verify_split(split_dir, limits_of(args), args.workers)
        state = "ok" if not found.problems else f"{len(found.problems)} problem(s)"
        print(f"{split_dir}: {found.rows} rows, {found.samples} samples, {found.images} images decoded: {state}")
        for problem in found.problems[: args.max_problems]:
            print(f"  {problem}")
        if len(found.problems) > args.max_problems:
            print(f"  ... and {len(found.problems) - args.max_problems} more (--max-problems)")
        num_problems += len(found.problems)
    return 1 if num_problems else 0


def add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=local_path, nargs="*", default=DATA, help="split, corpus or root folders")
    parser.add_argument("--max-problems", type=positive_number, default=20, help="lines shown for each split")
    parser.add_argument("--workers", type=positive_number, default=default_workers())
    parser.add_argument("--max-pixels", type=positive_number, default=Limits.max_pixels)
    parser.set_defaults(max_image_bytes=sys.maxsize, min_side=1, max_aspect=None, image_size=None)


def run_info(args: argparse.Namespace) -> int:
    descriptions = [info.describe_split(split) for path in args.data for split in info.all_splits(path)]
    print(json.dumps(descriptions, indent=1) if args.json else info.format_table(descriptions))
    return 0


def add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=local_path, nargs="*", default=DATA, help="split, corpus or root folders")
    parser.add_argument("--json", action="store_true", help="everything, for programs")


def run_overlap(args: argparse.Namespace) -> int:
    found = overlap.compare_splits([split for path in args.data for split in info.all_splits(path)])
    print("\n".join(found.lines))
    return 1 if found.shared else 0


def add_overlap(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=local_path, nargs="*", default=DATA, help="split, corpus or root folders")


VERBS: dict[str, Verb] = {
    "synth": ("make the synthetic corpora (no network, no files needed)", add_synth, run_synth),
    "urls": ("download a table of URLs and captions through img2dataset", add_urls, run_urls),
    "flickr8k": ("prepare Flickr8k from its images, captions and split lists", add_flickr8k, run_flickr8k),
    **ANNOTATION_VERBS,
    **VIDEO_VERBS,
    "tokenizer": ("train a byte-level BPE from prepared captions", add_tokenizer, run_tokenizer),
    "verify": ("reopen, re-hash, recount and decode everything", add_verify, run_verify),
    "info": ("describe prepared data: counts, sizes, captions, rejected records", add_info, run_info),
    "overlap": ("name images of training splits that stand in held-out splits", add_overlap, run_overlap),
}
