"""Writes all splits of a corpus of own pictures beside their places, which they take together when all are whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.annotations.annotated import AnnotatedSplit
from data_prep.manifest import Manifest, is_split, load_manifest
from data_prep.own_pictures.caption_rows import CaptionSource
from data_prep.own_pictures.gathering import Gathered
from data_prep.own_pictures.splits import SPLITS
from data_prep.passport import source_files
from data_prep.record import PrepError
from data_prep.shard_writer import put_in_place, refuse_existing

_SOURCE = "data_prep local"


def arguments_of(sources: list[CaptionSource], gathered: Gathered, splits: list[AnnotatedSplit]) -> dict[str, Any]:
    """What the splits are made of, for their manifests: the files of captions, the columns, a hash of all images."""
    contents = hashlib.sha256()
    for name in sorted(gathered.pictures):
        contents.update(f"{name}\0".encode("utf-8", "surrogateescape") + gathered.pictures[name].digest)
    return {
        "captions": source_files(path for source in sources for path in source.files),
        "columns": [source.columns and [*source.columns] for source in sources],
        "images": contents.hexdigest(),
        "splits": {one.split: len(one.images) for one in splits},
    }


def standing(corpus: Path, arguments: dict[str, Any], overwrite: bool) -> dict[str, Manifest] | None:
    """The splits of an earlier run with the same ``arguments``, if all are there; None where they are to be written.

    Raises PrepError where other splits stand there and ``overwrite`` is not given, saying what differs.
    """
    found = {split: load_manifest(corpus / split) for split in SPLITS if is_split(corpus / split)}
    for split in SPLITS:
        refuse_existing(corpus / split, overwrite=overwrite or split in found)
    if overwrite or not found:
        return None
    asked = json.loads(json.dumps(arguments))
    for split, manifest in found.items():
        known = manifest.provenance.get("arguments", {})
        if manifest.provenance.get("source") != _SOURCE:
            refuse_existing(corpus / split, overwrite=False)
        if known != asked:
            other = ", ".join(sorted(name for name in {*known, *asked} if known.get(name) != asked.get(name)))
            raise PrepError(
                f"{corpus / split}: prepared from other input ({other}); give --overwrite to replace it, or another "
                "--output"
            )
    return found if set(found) == set(arguments["splits"]) else None  # else a kill came between two of them


@contextmanager
def written_together(corpus: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A folder to write the splits of ``corpus`` in, and what gives them their places; nothing is left of it."""
    beside = corpus / f".{SPLITS[0]}.{os.getpid()}.part"  # the doctor knows such names
    shutil.rmtree(beside, ignore_errors=True)

    def publish() -> None:
        for split in SPLITS:
            if (beside / split).is_dir():
                put_in_place(beside / split, corpus / split)
            elif is_split(corpus / split):  # of an earlier run, replaced as a whole
                shutil.rmtree(corpus / split)

    made = not corpus.exists()
    try:
        beside.mkdir(parents=True)
        yield beside, publish
    except PrepError as error:
        raise PrepError(str(error).replace(str(beside), str(corpus))) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        if made and corpus.is_dir() and not any(corpus.iterdir()):
            corpus.rmdir()
