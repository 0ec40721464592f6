"""The verb that brings prepared data to an object store."""

from __future__ import annotations

import argparse

from data_prep.options.shared import local_path
from data_prep.stores.address import Address
from data_prep.stores.failures import StoreError
from data_prep.uploads.uploading import plan_upload, upload_files, verify_uploads


def run_upload(args: argparse.Namespace) -> int:
    plan = plan_upload(args.source, args.target)
    done = upload_files(plan, args.overwrite)
    print(
        f"{args.target}: {done.written} files written ({done.bytes / 2**20:.1f} MiB), {done.there} were there already"
    )
    if not args.verify:
        return 0
    problems = verify_uploads(plan)
    print(f"{args.target}: {len(plan)} files read again: {f'{len(problems)} problem(s)' if problems else 'ok'}")
    for problem in problems:
        print(f"  {problem}")
    return 1 if problems else 0


def add_upload(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=local_path, help="a prepared split, a corpus, or a root of corpora")
    parser.add_argument("target", type=address, help="where it goes, like s3://BUCKET/FOLDER")
    parser.add_argument("--verify", action="store_true", help="read everything again and compare the hashes")
    parser.add_argument("--overwrite", action="store_true", help="replace another split that is there")


def address(text: str) -> Address:
    try:
        return Address(text)
    except StoreError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
