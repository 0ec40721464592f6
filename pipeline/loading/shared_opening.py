"""Opens splits on all ranks together: one rank reads manifests, each looks at a share of the files, all agree."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from data_prep.manifest import MANIFEST_NAME, Manifest, ManifestError, first_bad_file
from data_prep.stores.address import Address
from data_prep.stores.failures import StoreError
from pipeline.distributed.endings import host_name
from pipeline.distributed.ranks import Agreement

Found = TypeVar("Found")
Split = tuple[Path | Address, Manifest]


def found_by_main(find: Callable[[], Found], agreement: Agreement) -> Found:
    """What ``find`` returns on the main rank, on every rank; its ValueError or OSError is raised on every rank.

    Every rank must call it. What is found travels pickled, between our own processes.
    """
    outcome: tuple[Found | None, Exception | None] = (None, None)
    if agreement.is_main:
        try:
            outcome = find(), None
        except ValueError as error:
            outcome = None, error
        except OSError as error:  # such as a folder that may not be listed
            outcome = None, ManifestError(f"{error.filename}: cannot be read ({error.strerror})")
    found, error = agreement.from_main(outcome)
    if error is not None:
        raise error
    return found


def check_in_shares(splits: Sequence[Split], agreement: Agreement) -> None:
    """Raise ManifestError on every rank, naming one file, unless each split is there on every rank and whole.

    Each rank looks for the manifests, which tells a rank without the data, and at its share of the shards: shard s is
    looked at by rank s modulo the number of ranks. Every rank must call it.
    """
    bad = [found for found in agreement.gather(_first_bad(splits, agreement)) if found is not None]
    if bad:
        _, _, rank, host, wrong = min(bad)
        raise ManifestError(wrong if agreement.alone else f"rank {rank} on {host}: {wrong}")


def _first_bad(splits: Sequence[Split], agreement: Agreement) -> tuple[int, int, int, str, str] | None:
    """Of this rank's share: number of the split, of the shard (-1: the manifest), rank, host, what is wrong."""
    here = agreement.rank, host_name()
    for number, (folder, manifest) in enumerate(splits):
        path = folder / MANIFEST_NAME
        try:
            if isinstance(path, Address):
                if not path.is_file():
                    return number, -1, *here, f"{path}: not there, but the main rank can read it"
            else:
                os.stat(path)
        except StoreError as error:
            return number, -1, *here, str(error)
        except OSError as error:
            return number, -1, *here, f"{path}: cannot be read ({error.strerror}), but the main rank can read it"
        numbers = range(agreement.rank, len(manifest.shards), agreement.world_size)
        bad = first_bad_file(folder, manifest.shards, numbers)
        if bad is not None:
            return number, bad[0], *here, bad[1]
    return None
