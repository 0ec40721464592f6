"""The verbs of corpora that are published as addresses: CC3M, CC12M, SBU and LAION."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_prep.options.downloads import add_download, begin, download_rows
from data_prep.options.dry_run import Counted, add_dry_run, plan_download
from data_prep.options.shared import Verb, local_path, name_list, plain_name, share
from data_prep.passport import source_files
from data_prep.record import PrepError, Rejection, UrlRow
from data_prep.sources.conceptual import conceptual_columns, conceptual_rows, split_of_name
from data_prep.sources.laion import Scores, laion_columns, laion_rows
from data_prep.sources.sbu import sbu_files, sbu_rows
from data_prep.sources.tables import table_files


def run_cc3m(args: argparse.Namespace) -> int:
    return _run_conceptual(args, "cc3m")


def add_cc3m(parser: argparse.ArgumentParser) -> None:
    files = "Train_GCC-training.tsv, Validation_GCC-1.1.0-Validation.tsv or the file with image labels"
    _add_options(parser, "data/cc3m", f"{files} (.gz, .bz2 and .zst too)", "default: train, or dev where it says Val")


def run_cc12m(args: argparse.Namespace) -> int:
    return _run_conceptual(args, "cc12m")


def add_cc12m(parser: argparse.ArgumentParser) -> None:
    _add_options(parser, "data/cc12m", "cc12m.tsv (.gz, .bz2 and .zst too)", "default: train")


def _run_conceptual(args: argparse.Namespace, corpus: str) -> int:
    columns, url_and_caption = conceptual_columns(args.input)
    published_order = ["caption", "url"] if corpus == "cc3m" else ["url", "caption"]
    if columns is not None and columns[:2] != published_order:
        print(f"{args.input}: {columns[0]} first, unlike the published file; read so")
    published = args.split = args.split or (split_of_name(args.input) if corpus == "cc3m" else "train")
    if columns is not None and "labels" in columns:
        published = f"{args.split}, with image labels"
    rows = conceptual_rows(args.input, columns, url_and_caption)
    return _download(args, corpus, published, rows, [args.input], columns=columns)


def run_sbu(args: argparse.Namespace) -> int:
    files = sbu_files(args.input)
    args.split = args.split or "train"
    return _download(args, "sbu", args.split, sbu_rows(files), files)


def add_sbu(parser: argparse.ArgumentParser) -> None:
    files = "folder of SBU_captioned_photo_dataset_{urls,captions}.txt, its tar.gz, or sbu-captions-all.json"
    _add_options(parser, "data/sbu", files, "default: train")


def run_laion(args: argparse.Namespace) -> int:
    files = table_files(args.input, "parquet")
    if other := next((path for path in files if path.suffix.lower() != ".parquet"), None):
        raise PrepError(
            f"{other}: expected a parquet file, or a folder of them; other tables are read by the verb urls"
        )
    nsfw = None if args.nsfw is None else tuple(args.nsfw)
    wanted = Scores(args.max_punsafe, args.min_similarity, args.max_watermark, nsfw)
    for path in files:
        laion_columns(path, wanted, args.caption_column)  # raises before anything is read
    args.split = args.split or "train"
    rows = laion_rows(files, wanted, args.caption_column)
    scores = [args.max_punsafe, args.min_similarity, args.max_watermark, args.nsfw]
    return _download(args, "laion", args.split, rows, files, caption=args.caption_column, scores=scores)


def add_laion(parser: argparse.ArgumentParser) -> None:
    _add_options(parser, "data/laion", "folder of parquet files, or one of them", "default: train")
    add = parser.add_argument
    add("--caption-column", help="default: the first there of top_caption, caption, TEXT; all_captions has several")
    add("--max-punsafe", type=share, help="drop images whose punsafe is above this, or missing")
    add("--nsfw", type=name_list, help="keep these labels of the column NSFW alone, as UNLIKELY,UNSURE")
    add("--min-similarity", type=share, help="drop pairs whose similarity is below this, or missing")
    add("--max-watermark", type=share, help="drop images whose pwatermark is above this, or missing")


def _download(
    args: argparse.Namespace,
    corpus: str,
    published: str,
    rows: Iterable[UrlRow | Rejection],
    files: list[Path],
    **read_as: Any,
) -> int:
    """Download the rows, or say what that would be; ``read_as`` is what the rows depend on besides the files."""
    if args.dry_run:
        return plan_download(args, corpus, published, rows)
    begin(args)
    request = {"corpus": corpus, "files": source_files(files), **read_as}
    return download_rows(args, _announced(rows, corpus, published), request)


def _announced(rows: Iterable[UrlRow | Rejection], corpus: str, published: str) -> Iterator[UrlRow | Rejection]:
    """The rows, and when all are read a line with their number beside the published one."""
    counted = Counted(rows)
    yield from counted
    print(counted.counts(corpus, published))


def _add_options(parser: argparse.ArgumentParser, output: str, files: str, split: str) -> None:
    parser.add_argument("--input", type=local_path, required=True, help=files)
    parser.add_argument("--output", type=local_path, default=Path(output), help="corpus folder")
    parser.add_argument("--split", type=plain_name, help=f"its name; {split}")
    add_dry_run(parser)
    add_download(parser)


CORPUS_VERBS: dict[str, Verb] = {
    "cc3m": ("download Conceptual Captions (3M) from its published TSV", add_cc3m, run_cc3m),
    "cc12m": ("download Conceptual 12M from its published TSV", add_cc12m, run_cc12m),
    "sbu": ("download SBU's captioned photographs from its published lists", add_sbu, run_sbu),
    "laion": ("download LAION from its published parquet files", add_laion, run_laion),
}
