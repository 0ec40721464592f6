"""The verb that draws the synthetic corpora."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_prep.drawn import synth
from data_prep.options.shared import (
    add_writing,
    from_arguments,
    local_path,
    positive_number,
    report_split,
    whole_number,
)


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
