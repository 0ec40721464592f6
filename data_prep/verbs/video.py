"""The verbs that prepare corpora of clips: MSR-VTT, MSVD, WebVid, and moving shapes that are drawn."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_prep.drawn.moving_scenes import MovingOptions, write_moving
from data_prep.options.dry_run import add_dry_run, plan_records
from data_prep.options.shared import (
    Verb,
    add_clip_limits,
    add_writing,
    from_arguments,
    local_path,
    plain_name,
    positive_number,
    report_split,
    share,
    split_writer,
    whole_number,
)
from data_prep.passport import source_files
from data_prep.prepare import fill_split
from data_prep.record import PrepError
from data_prep.shard_writer import describe_counts
from data_prep.verbs.annotation import Part, prepare_parts
from data_prep.video.decoding import ClipLimits, require_decoder
from data_prep.video_sets.msrvtt import read_msrvtt
from data_prep.video_sets.msvd import read_msvd
from data_prep.video_sets.webvid import webvid_records


def run_msrvtt(args: argparse.Namespace) -> int:
    splits = read_msrvtt(args.annotations, args.with_validation)
    published = {"train": "train, with validation"} if args.with_validation else {}
    parts = [Part(args.output, split, args.videos, "msrvtt", published.get(split.split, "")) for split in splits]
    return _prepare(args, parts, args.annotations)


def add_msrvtt(parser: argparse.ArgumentParser) -> None:
    files = "train_val_videodatainfo.json and test_videodatainfo.json, or one file of all"
    parser.add_argument("--annotations", type=local_path, nargs="+", required=True, help=files)
    also = "train on the validation clips too, 7,010, as papers on captioning do; there is no dev split then"
    parser.add_argument("--with-validation", action="store_true", help=also)
    _add_options(parser, "data/msrvtt", "folders of video0.mp4 to video9999.mp4")


def run_msvd(args: argparse.Namespace) -> int:
    named = {"train": args.train_list, "dev": args.dev_list, "test": args.test_list}
    lists = {split: path for split, path in named.items() if path is not None}
    if bool(lists) == (args.mapping is not None):
        raise PrepError(
            "which clips are in which split: give --train-list, --dev-list, --test-list, or --mapping alone"
        )
    splits = read_msvd(args.captions, lists, args.mapping)
    files = [args.captions, *lists.values(), *([args.mapping] if args.mapping else [])]
    return _prepare(args, [Part(args.output, split, args.videos, "msvd") for split in splits], files)


def add_msvd(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--captions", type=local_path, required=True, help="AllVideoDescriptions.txt")
    for split in ("train", "dev", "test"):
        add(f"--{split}-list", type=local_path, help=f"clips of the {split} split, VIDEO_START_END on each line")
    add("--mapping", type=local_path, help="youtube_mapping.txt, instead of the lists: 1,200, 100 and 670 clips")
    _add_options(parser, "data/msvd", "folders of clips like mv89psg6zh4_33_46.avi (YouTubeClips)")


def run_webvid(args: argparse.Namespace) -> int:
    if args.dry_run:
        return plan_records(args, args.output / args.split, webvid_records(args.input, args.videos))
    require_decoder()
    limits = from_arguments(ClipLimits, args)
    arguments = {"files": source_files([args.input]), **limits.__dict__}
    writer = split_writer(args, args.output, args.split, arguments, ("av",), videos=True)
    source = webvid_records(args.input, args.videos)
    manifest = fill_split(writer, source, limits, args.workers, min_yield=args.min_yield, label=args.split)
    report_split(args.output / args.split, manifest)
    lost = sum(manifest.rejected.values())
    print(f"yield: {manifest.rows:,} of {manifest.rows + lost:,} rows ({manifest.rows / (manifest.rows + lost):.1%})")
    for reason, first in writer.examples.items():
        print(f"lost: {describe_counts({reason: manifest.rejected[reason]})}, such as {first.name} ({first.detail})")
    return 0


def add_webvid(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input", type=local_path, required=True, help="results_2M_train.csv, results_2M_val.csv or alike")
    add("--videos", type=local_path, nargs="+", required=True, help="folders of PAGE_DIR/VIDEOID.mp4 or VIDEOID.mp4")
    add("--split", default="train", type=plain_name)
    add("--output", type=local_path, default=Path("data/webvid"), help="corpus folder")
    add("--min-yield", type=share, default=0.0, help="write nothing below this share of usable rows")
    add_dry_run(parser)
    add_clip_limits(parser)
    add_writing(parser)


def run_moving(args: argparse.Namespace) -> int:
    counts = {"train": args.train, "dev": args.dev, "test": args.test}
    for manifest in write_moving(args.output, from_arguments(MovingOptions, args, counts=counts)):
        report_split(args.output / manifest.split, manifest)
    return 0


def add_moving(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=local_path, default=Path("data/moving"), help="corpus folder")
    parser.add_argument("--train", type=whole_number, default=2000, help="training clips")
    parser.add_argument("--dev", type=whole_number, default=200, help="clips of the dev split")
    parser.add_argument("--test", type=whole_number, default=200, help="clips of the test split")
    parser.add_argument("--image-size", type=positive_number, default=MovingOptions.image_size, help="pixels a side")
    parser.add_argument("--num-frames", type=positive_number, default=MovingOptions.num_frames, help="of each clip")
    parser.add_argument("--seed", type=int, default=0)
    add_writing(parser)


def _add_options(parser: argparse.ArgumentParser, output: str, videos: str) -> None:
    parser.add_argument("--videos", type=local_path, nargs="+", default=[], help=videos)
    parser.add_argument("--output", type=local_path, default=Path(output), help="corpus folder")
    parser.add_argument("--check", action="store_true", help="read the annotation files alone, print what they hold")
    add_dry_run(parser)
    add_clip_limits(parser)
    add_writing(parser)


def _prepare(args: argparse.Namespace, parts: list[Part], files: list[Path]) -> int:
    if not (args.check or args.dry_run):
        require_decoder()
    return prepare_parts(args, parts, files, limits=from_arguments(ClipLimits, args))


VIDEO_VERBS: dict[str, Verb] = {
    "msrvtt": ("prepare MSR-VTT's clips and captions", add_msrvtt, run_msrvtt),
    "msvd": ("prepare MSVD's clips and captions", add_msvd, run_msvd),
    "webvid": ("prepare those rows of a WebVid table whose videos are there", add_webvid, run_webvid),
    "moving": ("draw clips of moving shapes (no network, no files needed)", add_moving, run_moving),
}
