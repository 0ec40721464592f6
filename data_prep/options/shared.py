"""Options, argument types and output lines that the verbs share."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from data_prep.caption_language import check_languages
from data_prep.filters import Limits
from data_prep.manifest import CAPTIONS, Manifest
from data_prep.parallel import default_workers
from data_prep.prepare import provenance
from data_prep.record import PrepError
from data_prep.shard_writer import SplitWriter, describe_counts
from data_prep.stores.address import Address, data_path
from data_prep.stores.failures import StoreError
from data_prep.video.decoding import ClipLimits

Options = TypeVar("Options")
Verb = tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]


class Folders(list[Path]):
    """A list of folders that ``--help`` shows as a user would type it."""

    def __str__(self) -> str:
        return " ".join(map(str, self))


DATA = Folders([Path("data")])


def add_filters(parser: argparse.ArgumentParser, duplicates: bool = True) -> None:
    group = parser.add_argument_group("what is kept (docs/data.md explains each reason)")
    group.add_argument(
        "--image-size", type=positive_number, help="shrink the shorter side to this; default: keep the bytes"
    )
    group.add_argument("--image-format", choices=("jpg", "png"), help="of all images; default: as they came")
    group.add_argument("--max-pixels", type=positive_number, default=Limits.max_pixels, help="refused before decoding")
    group.add_argument("--max-image-bytes", type=positive_number, default=Limits.max_image_bytes)
    group.add_argument("--min-side", type=positive_number, default=Limits.min_side, help="pixels")
    group.add_argument("--max-aspect", type=float, help="longer over shorter side; default: any")
    group.add_argument("--min-words", type=positive_number, default=Limits.min_words, help="of a caption")
    group.add_argument("--max-words", type=positive_number, help="of a caption; default: any number")
    group.add_argument(
        "--language",
        dest="languages",
        metavar="EN,DE",
        type=language_list,
        default=[],
        help="keep captions in these languages (ISO 639-1), and those that are too short to tell; default: any",
    )
    if duplicates:
        group.add_argument("--drop-duplicates", action="store_true", help="drop a caption an equal image had before")


def add_clip_limits(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is kept (docs/data.md explains each reason)")
    group.add_argument("--max-pixels", type=positive_number, default=ClipLimits.max_pixels, help="of a frame")
    group.add_argument("--max-video-bytes", type=positive_number, default=ClipLimits.max_video_bytes)
    group.add_argument("--max-frames", type=positive_number, default=ClipLimits.max_frames, help="20000 is the limit")
    group.add_argument("--min-side", type=positive_number, default=ClipLimits.min_side, help="pixels")


def add_writing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples-per-shard", type=positive_number, default=2000)
    parser.add_argument(
        "--workers", type=positive_number, default=default_workers(), help="processes; of a download --processes counts"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a split that is there already")


def limits_of(args: argparse.Namespace) -> Limits:
    return from_arguments(Limits, args)


def decoding_limits(args: argparse.Namespace) -> Limits:
    """For what was prepared once: its images must decode within ``--max-pixels``, whatever else was asked then."""
    return Limits(max_pixels=args.max_pixels, max_image_bytes=sys.maxsize, min_side=1)


def from_arguments(options: type[Options], args: argparse.Namespace, **given: Any) -> Options:
    """A dataclass of options, its fields ``given`` or taken from the arguments of the same name."""
    named = {field.name: getattr(args, field.name) for field in dataclasses.fields(options) if field.name not in given}
    return options(**named, **given)


def split_writer(
    args: argparse.Namespace,
    corpus: Path,
    split: str,
    arguments: dict[str, Any],
    packages: tuple[str, ...],
    num_images: int = 1,
    texts: str = CAPTIONS,
    videos: bool = False,
    caption_key: str | None = None,
    corpus_name: str | None = None,
) -> SplitWriter:
    """The writer of one split, that names the verb and its ``arguments`` as where the split comes from; the corpus is
    called as its folder if nothing else is said."""
    return SplitWriter(
        corpus / split,
        corpus_name or corpus.resolve().name,
        split,
        num_images=num_images,
        samples_per_shard=args.samples_per_shard,
        overwrite=args.overwrite,
        provenance=provenance(f"data_prep {args.verb}", arguments, packages),
        texts=texts,
        videos=videos,
        caption_key=caption_key,
    )


def report_split(split_dir: Path, manifest: Manifest) -> None:
    rejected = f"; rejected: {describe_counts(manifest.rejected)}" if manifest.rejected else ""
    print(f"{split_dir}: {manifest.rows} rows, {manifest.samples} samples, {len(manifest.shards)} shards{rejected}")


def whole_number(text: str) -> int:
    return _bounded(int, text, "a whole number from 0", lambda value: value >= 0)


def positive_number(text: str) -> int:
    return _bounded(int, text, "a whole number from 1", lambda value: value >= 1)


def positive_rate(text: str) -> float:
    return _bounded(float, text, "a number above 0", lambda value: 0 < value < float("inf"))


def share(text: str) -> float:
    return _bounded(float, text, "a number from 0 to 1", lambda value: 0 <= value <= 1)


def _bounded(kind: type, text: str, expected: str, accept: Callable[[Any], bool]) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not accept(value):
        raise argparse.ArgumentTypeError(f"{text!r}, expected {expected}")
    return value


def local_path(text: str) -> Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a path; mount or copy what is not on a file system")
    return Path(text)


def table_path(text: str) -> Path | Address:
    """A path, or the address of a table in a store, which ``fetch_tables`` copies to this disk."""
    try:
        return data_path(text)
    except StoreError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def name_list(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def language_list(text: str) -> tuple[str, ...]:
    names = tuple(name.lower() for name in name_list(text))
    try:
        check_languages(names)
    except PrepError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return names


def plain_name(text: str) -> str:
    if not text or text.startswith(".") or "/" in text:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a plain folder name")
    return text
