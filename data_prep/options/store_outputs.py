"""Lets verbs write to an object store: what they prepare on this disk is uploaded, verified by size, and removed."""

from __future__ import annotations

import argparse
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

from data_prep.manifest import is_split
from data_prep.options.shared import Verb, local_path
from data_prep.record import PrepError
from data_prep.stores.address import Address
from data_prep.stores.failures import StoreError
from data_prep.uploads.uploading import plan_upload, refuse_unwritable, upload_files

STAGING = Path("data/.uploads")
_WITHOUT_SPLITS = ("tokenizer", "report")  # their output is no prepared data


def with_store_outputs(verbs: dict[str, Verb]) -> dict[str, Verb]:
    """The verbs; ``--output`` of those that write splits may be an address as well."""
    return {name: verb if name in _WITHOUT_SPLITS else _with_store_output(verb) for name, verb in verbs.items()}


def _with_store_output(verb: Verb) -> Verb:
    summary, add_options, run = verb
    return summary, _offering(add_options), _uploading(run)


def _offering(add_options: Callable[[argparse.ArgumentParser], None]) -> Callable:
    def add(parser: argparse.ArgumentParser) -> None:
        add_options(parser)
        outputs = [one for one in parser._actions if "--output" in one.option_strings and one.type is local_path]
        for output in outputs:
            output.type = _path_or_address
            output.help = f"{output.help}, or s3://BUCKET/FOLDER"
            where = "where data is prepared that --output s3://... uploads; after a kill it goes on there"
            parser.add_argument("--staging", type=local_path, default=STAGING, metavar="DIR", help=where)

    return add


def _uploading(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    def uploaded(args: argparse.Namespace) -> int:
        target = getattr(args, "output", None)
        if not isinstance(target, Address):
            return run(args)
        refuse_unwritable(target)
        overwrite = getattr(args, "overwrite", False)
        above = args.staging / hashlib.sha256(target.url.encode()).hexdigest()[:12]
        _refuse_early(args, above, target, overwrite)
        args.output = above / target.name
        code = run(args)
        if code == 0 and not getattr(args, "dry_run", False):
            _bring(above, target, overwrite)
        return code

    return uploaded


def _refuse_early(args: argparse.Namespace, above: Path, target: Address, overwrite: bool) -> None:
    """Before hours of work, what would be refused at its end; names what an earlier command did not bring to its end.

    Raises:
        PrepError: with the reason and what to do.
    """
    if getattr(args, "engine", None) == "array":
        raise PrepError(
            f"--engine array with --output {target}: no task is the last to know; give a folder that all tasks share, "
            "then `python -m data_prep upload`"
        )
    if overwrite:
        return
    for corpus, _ in _finished(above):
        raise PrepError(
            f"{corpus}: prepared by an earlier command that was not uploaded to its end; `python -m data_prep upload "
            f"{corpus} {target.parent / corpus.name}` goes on, --overwrite prepares it anew"
        )
    split = getattr(args, "split", None)
    if split and is_split(target / split):
        raise PrepError(f"{target / split}: a split is there; give --overwrite to replace it, or another --output")


def _finished(above: Path) -> list[tuple[Path, list[Path]]]:
    """Corpora below ``above`` with their finished splits, those that have any."""
    corpora = sorted(path for path in above.iterdir() if path.is_dir()) if above.is_dir() else []
    found = [
        (corpus, [path for path in sorted(corpus.rglob("*")) if path.is_dir() and is_split(path)]) for corpus in corpora
    ]
    return [(corpus, splits) for corpus, splits in found if splits]


def _bring(above: Path, target: Address, overwrite: bool) -> None:
    """Upload every finished split in ``above``, its corpus beside ``target``, then remove it here."""
    for corpus, splits in _finished(above):
        place = target.parent / corpus.name
        done = upload_files(plan_upload(corpus, place), overwrite)
        print(f"{place}: {done.written} files written ({done.bytes / 2**20:.1f} MiB), {done.there} were there already")
        for split in splits:
            shutil.rmtree(split)
        if not any(path.is_dir() for path in corpus.iterdir()):  # else another split is being prepared in it
            shutil.rmtree(corpus)


def _path_or_address(text: str) -> Path | Address:
    if "://" not in text:
        return local_path(text)
    try:
        return Address(text)
    except StoreError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
