"""The verbs about images that are alike: hashes of splits, decontamination, duplicates."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.checks.info import all_splits
from data_prep.filters import Limits
from data_prep.manifest import Manifest, is_split, read_manifest
from data_prep.options.shared import Verb, local_path, positive_number, report_split, whole_number
from data_prep.parallel import default_workers
from data_prep.prepare import provenance
from data_prep.record import PrepError, Rejection
from data_prep.shard_writer import refuse_existing
from data_prep.similar import held_out, repeats
from data_prep.similar.contact_sheet import Pair, write_sheet
from data_prep.similar.copying import copy_split, target_of
from data_prep.similar.hash_files import HashSet, export, has_hashes, versions
from data_prep.similar.hashing import hashes_at
from data_prep.similar.pictures import MIN_CORRELATION

_SHEET_PAIRS = 500


def run_hashes(args: argparse.Namespace) -> int:
    for split_dir in [split for path in args.data for split in all_splits(path)]:
        if read_manifest(split_dir).is_video:
            print(f"{split_dir}: holds clips, which have no picture hash; passed over")
            continue
        found = hashes_at(split_dir, args.workers, args.max_pixels, args.anew)
        about = found.about
        print(
            f"{split_dir}: {about.samples * about.num_images} images hashed; without a hash: {about.without_hash} "
            f"(flat, two-tone or unreadable, of which unreadable {about.unreadable})"
        )
        for digest, count, key in about.commonest[: args.commonest]:
            print(f"  {count} times the same image: {digest}, such as {key}")
        if args.export is not None:
            print(f"  copied to {export(found, args.export)}")
    return 0


def add_hashes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=local_path, nargs="+", help="split, corpus or root folders")
    parser.add_argument("--export", type=local_path, help="copy the hashes below this folder too: CORPUS_SPLIT/")
    parser.add_argument("--anew", action="store_true", help="make them even where they are there")
    parser.add_argument("--commonest", type=whole_number, default=5, help="images that come most often, at most 20")
    _add_hashing(parser)


def run_decontaminate(args: argparse.Namespace) -> int:
    if args.report == (args.output is not None):
        raise PrepError(
            "say what to do with contaminated samples: --output FOLDER for a copy without them, or --report"
        )
    held_dirs = [folder for path in args.against for folder in _hash_sources(path)]
    targets: list[Path] = []
    for split_dir in args.data:
        if split_dir.resolve() in [folder.resolve() for folder in held_dirs]:
            raise PrepError(f"{split_dir}: stands in --against too; name other splits there")
        if args.output is not None:
            targets.append(target_of(args.output, read_manifest(split_dir), targets))
            refuse_existing(targets[-1], args.overwrite)
    others = [hashes_at(folder, args.workers, args.max_pixels) for folder in held_dirs]
    _note_versions(others)
    total, pairs = 0, []
    for number, split_dir in enumerate(args.data):
        split = hashes_at(split_dir, args.workers, args.max_pixels)
        matches = held_out.held_out_matches(
            split, others, args.distance, not args.no_crops, args.mirror, args.workers, args.scratch
        )
        leave_out: dict[int, Rejection] = {}
        for match in matches:
            reason = "held_out_copy" if match.exact else "near_held_out"
            sample = match.row // split.about.num_images
            leave_out.setdefault(sample, Rejection(reason, split.key(match.row), match.detail(others)))
            one, other = (split, split_dir, match.row), (others[match.other], held_dirs[match.other], match.other_row)
            pairs.append(Pair(one, other, f"{split.name} {split.key(match.row)}: {match.detail(others)}"))
        total += len(leave_out)
        _print_found(split, leave_out, "contaminated", args.max_lines)
        if args.output is not None:
            arguments = {
                "against": [{"name": one.name, "fingerprint": one.about.fingerprint} for one in others],
                **_rule(args, crops=not args.no_crops),
            }
            _write(args, split_dir, targets[number], leave_out, arguments)
    _write_pairs(args.sheet, pairs, "Images that are like held-out ones")
    return 1 if args.report and total else 0


def add_decontaminate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=local_path, nargs="+", help="splits to clean, as CORPUS/SPLIT")
    parser.add_argument(
        "--against",
        type=local_path,
        nargs="+",
        required=True,
        help="held-out splits, or hashes of them that `hashes --export` wrote",
    )
    parser.add_argument("--report", action="store_true", help="write no split; exit code 1 if anything is found")
    parser.add_argument("--no-crops", action="store_true", help="do not look for copies with up to 5 %% cut off")
    _add_comparing(parser, held_out.DISTANCE)


def run_dedupe(args: argparse.Namespace) -> int:
    if args.report == (args.output is not None):
        raise PrepError("say what to do with duplicates: --output FOLDER for a copy without them, or --report")
    targets: list[Path] = []
    for split_dir in args.data if args.output is not None else ():
        targets.append(target_of(args.output, read_manifest(split_dir), targets))
        refuse_existing(targets[-1], args.overwrite)
    sets = [hashes_at(split_dir, args.workers, args.max_pixels) for split_dir in args.data]
    found = repeats.repeated_samples(
        sets, args.distance, args.mirror, args.max_image_repeats, not args.exact, args.workers, args.scratch
    )
    pairs = [
        Pair(
            (sets[one.number], args.data[one.number], one.row),
            (sets[one.like[0]], args.data[one.like[0]], one.like[1]),
            f"{sets[one.number].name} {sets[one.number].key(one.row)}: {one.detail}",
        )
        for one in found
        if one.like is not None
    ]
    for number, split_dir in enumerate(args.data):
        leave_out = {
            one.sample: Rejection(one.reason, sets[number].key(one.row), one.detail)
            for one in found
            if one.number == number
        }
        _print_found(sets[number], leave_out, "repeated", args.max_lines)
        if args.output is not None:
            arguments = {
                "among": [{"name": one.name, "fingerprint": one.about.fingerprint} for one in sets],
                "exact": args.exact,
                "max_image_repeats": args.max_image_repeats,
                **_rule(args),
            }
            _write(args, split_dir, targets[number], leave_out, arguments)
    _write_pairs(args.sheet, pairs, "Repeated images")
    return 1 if args.report and found else 0


def add_dedupe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=local_path, nargs="+", help="splits, as CORPUS/SPLIT; what stands earlier stays")
    parser.add_argument("--report", action="store_true", help="write no split; exit code 1 if anything is found")
    parser.add_argument("--exact", action="store_true", help="only images of the same bytes")
    parser.add_argument(
        "--max-image-repeats",
        type=positive_number,
        help="drop every sample of an image that comes more often: what servers send for missing ones; default: any",
    )
    _add_comparing(parser, repeats.DISTANCE)


def _add_comparing(parser: argparse.ArgumentParser, distance: int) -> None:
    parser.add_argument("--output", type=local_path, help="write OUTPUT/CORPUS/SPLIT without what is found")
    parser.add_argument("--mirror", action="store_true", help="look for mirrored copies too")
    parser.add_argument("--distance", type=whole_number, default=distance, help="bits of 64 that hashes may differ in")
    parser.add_argument("--sheet", type=local_path, help=f"write a page of pairs to look at, at most {_SHEET_PAIRS}")
    parser.add_argument("--max-lines", type=whole_number, default=20, help="pairs printed for each split")
    parser.add_argument("--scratch", type=local_path, help="folder for sorted hashes; default: the system's")
    parser.add_argument("--overwrite", action="store_true", help="replace a split that is there already")
    _add_hashing(parser)


def _add_hashing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=positive_number, default=default_workers(), help="processes")
    parser.add_argument("--max-pixels", type=positive_number, default=Limits.max_pixels)


def _hash_sources(path: Path) -> list[Path]:
    """A split, a folder of hashes, or the folders of hashes in a folder."""
    if is_split(path) or has_hashes(path) or not path.is_dir():
        return [path]
    return sorted(folder for folder in path.iterdir() if has_hashes(folder)) or [path]


def _note_versions(others: Sequence[HashSet]) -> None:
    for other in others:
        if other.about.versions != versions():
            print(f"{other.folder}: made with {other.about.versions}, here are {versions()}: a bit or two may differ")


def _rule(args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    return {"distance": args.distance, "correlation": MIN_CORRELATION, "mirror": args.mirror, **more}


def _print_found(split: HashSet, leave_out: dict[int, Rejection], word: str, max_lines: int) -> None:
    print(f"{split.name}: {len(leave_out)} of {split.about.samples} samples {word}")
    for sample in sorted(leave_out)[:max_lines]:
        print(f"  {leave_out[sample].name}: {leave_out[sample].reason}: {leave_out[sample].detail}")
    if len(leave_out) > max_lines:
        print(f"  ... and {len(leave_out) - max_lines} more (--max-lines)")


def _write(
    args: argparse.Namespace, source: Path, target: Path, leave_out: dict[int, Rejection], arguments: dict[str, Any]
) -> None:
    manifest: Manifest = read_manifest(source)
    made = provenance(f"data_prep {args.verb}", arguments, ("numpy", "pillow"))
    made["made_from"] = {
        "fingerprint": manifest.fingerprint(),
        "rejected": manifest.rejected,
        "provenance": manifest.provenance,
    }
    copied = copy_split(source, manifest, target, leave_out, made, args.workers, args.overwrite)
    report_split(target, copied)


def _write_pairs(path: Path | None, pairs: list[Pair], title: str) -> None:
    if path is not None:
        write_sheet(path, pairs[:_SHEET_PAIRS], f"{title}: {len(pairs)}")
        print(f"{path}: {min(len(pairs), _SHEET_PAIRS)} of {len(pairs)} pairs")


SIMILAR_VERBS: dict[str, Verb] = {
    "hashes": ("hash the images of splits, to find those that are alike", add_hashes, run_hashes),
    "decontaminate": ("drop or name samples whose images are like held-out ones", add_decontaminate, run_decontaminate),
    "dedupe": ("drop or name samples whose images were there before", add_dedupe, run_dedupe),
}
