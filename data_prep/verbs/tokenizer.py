"""The verb that trains a tokenizer."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_prep import tokenizer
from data_prep.manifest import ManifestError, find_splits
from data_prep.options.shared import (
    DATA,
    local_path,
    positive_number,
)


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
