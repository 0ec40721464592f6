"""The verb that finds and repairs what is wrong with prepared data."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.checks.verify import Problem
from data_prep.filters import Limits
from data_prep.manifest import ManifestError
from data_prep.options.shared import decoding_limits, local_path, positive_number, whole_number
from data_prep.parallel import default_workers
from data_prep.record import PrepError
from data_prep.repairing.diagnosis import KINDS, Diagnosis, examine, leftovers_below, split_folders
from data_prep.repairing.repair import clear, repair_split

_ROUNDS = 3  # of repairs: what an index that was made again leads to is seen in the next
_ADVICE = "run `python -m data_prep synth` first, or name a folder that holds prepared data"


def run_doctor(args: argparse.Namespace) -> int:
    if args.quarantine is not None and not args.repair:
        raise PrepError("--quarantine moves files, which --repair alone does; give both or neither")
    args.repair &= not args.dry_run
    healthy = True
    for path in args.data:
        if not path.is_dir():
            raise ManifestError(f"{path}: no such folder; {_ADVICE}")
        for kinds in (("unpublished",), ("leftover", "superseded")) if args.repair else ():
            for leftover in leftovers_below(path, args.min_age * 60):
                if leftover.kind in kinds:
                    name = leftover.split_dir.name if leftover.kind == "superseded" else leftover.path.name
                    _print(clear(leftover, _quarantine(args, leftover.path.parent, name)))
        left = leftovers_below(path, args.min_age * 60)
        folders = split_folders(path)
        if not folders and not left:
            raise ManifestError(f"{path}: nothing prepared here; {_ADVICE}")
        problems = [Problem(one.kind, one.text) for one in left if one.kind in KINDS]
        _print([one.text for one in left if one.kind not in KINDS])
        if problems:
            _report(f"{path}: beside its splits", problems, args.max_problems)
            healthy = False
        for folder in folders:
            healthy &= _look_after(folder, args)
    return 0 if healthy else 1


def _look_after(split_dir: Path, args: argparse.Namespace) -> bool:
    """Examine a split, repair it if asked to, and say what was found; whether it is healthy now."""
    diagnosis = _examined(split_dir, args)
    _report_split(diagnosis, args)
    for _ in range(_ROUNDS if args.repair else 0):
        if not diagnosis.problems:
            break
        with _alone(split_dir):
            done = repair_split(diagnosis, _quarantine(args, split_dir.absolute().parent, split_dir.name), args.workers)
        _print(done)
        before, diagnosis = diagnosis, _examined(split_dir, args)
        _report_split(diagnosis, args)
        if diagnosis.problems == before.problems:
            break
    return not diagnosis.problems


def _examined(split_dir: Path, args: argparse.Namespace) -> Diagnosis:
    return examine(split_dir, decoding_limits(args) if args.decode else None, args.workers, args.min_age * 60)


def _report_split(diagnosis: Diagnosis, args: argparse.Namespace) -> None:
    found = diagnosis.findings
    state = "healthy" if not found.found else f"{len(found.found)} problem(s)"
    decoded = f", {found.images} images decoded" if args.decode else ""
    _report(
        f"{diagnosis.split_dir}: {found.rows} rows, {found.samples} samples{decoded}: {state}",
        found.found,
        args.max_problems,
    )
    for note in found.notes[: args.max_problems]:
        print(f"  note: {note}")


def _report(title: str, problems: Sequence[Problem], max_problems: int) -> None:
    """The problems, kind by kind, with what is broken by them and what a repair does."""
    print(title)
    for kind in dict.fromkeys(problem.kind for problem in problems):
        found = [problem.text for problem in problems if problem.kind == kind]
        print(f"  {kind} ({len(found)}): breaks: {KINDS[kind].breaks}; --repair: {KINDS[kind].repair}")
        for text in found[:max_problems]:
            print(f"    {text}")
        if len(found) > max_problems:
            print(f"    ... and {len(found) - max_problems} more (--max-problems)")


def _print(lines: Sequence[str]) -> None:
    for line in lines:
        print(f"  {line}")


def _quarantine(args: argparse.Namespace, corpus: Path, split: str) -> Path:
    """Where unusable files of a split go: a hidden folder of its corpus, which no program searches, or where told."""
    if args.quarantine is None:
        return corpus / ".quarantine" / split
    return args.quarantine / corpus.resolve().name / split


@contextlib.contextmanager
def _alone(split_dir: Path) -> Iterator[None]:
    """Raises PrepError where another doctor repairs the split; file systems without locks are taken at their word."""
    descriptor = os.open(split_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PrepError(f"{split_dir}: another doctor repairs it; wait for its end") from None
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


def add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=local_path, nargs="+", help="split, corpus or root folders")
    parser.add_argument("--repair", action="store_true", help="repair what can be; default: say what would be done")
    parser.add_argument("--dry-run", action="store_true", help="change nothing, as without --repair")
    parser.add_argument("--quarantine", type=local_path, help="where unusable files go; default: .quarantine beside")
    parser.add_argument("--decode", action="store_true", help="read every text and decode every image and clip too")
    parser.add_argument(
        "--min-age", type=whole_number, default=60, help="minutes without a change after which files were left behind"
    )
    parser.add_argument("--max-problems", type=positive_number, default=20, help="lines shown for each kind")
    parser.add_argument("--workers", type=positive_number, default=default_workers(), help="processes")
    parser.add_argument("--max-pixels", type=positive_number, default=Limits.max_pixels, help="with --decode")
