"""Which split each image belongs to: what the captions or folders say, else a draw by a hash of its content."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping

TRAIN, DEV, TEST = SPLITS = ("train", "dev", "test")
SPLIT_NAMES = {"train": TRAIN, "training": TRAIN, "val": DEV, "valid": DEV, "validation": DEV, "dev": DEV, "test": TEST}
SPLIT_NAMES |= {"testing": TEST, "restval": TRAIN}


def folder_splits(names: Iterable[str]) -> dict[str, str]:
    """Name -> split where all images lie in folders called train, val, test or the like; empty where one does not."""
    found = {name: SPLIT_NAMES.get(name.split("/")[0].lower(), "") for name in names if "/" in name}
    return found if all(found.values()) and len(found) == len(set(names)) else {}


def draw(
    contents: Iterable[bytes],
    shares: Mapping[str, float],
    seed: int,
    is_usable: Callable[[bytes], bool] = lambda content: True,
) -> dict[bytes, str]:
    """Content (a digest) -> split. ``shares`` are those of dev and test, from 0 to 1 together.

    Where a content goes depends on itself and ``seed`` alone, so that further images move none; but train gets a usable
    one, then dev and test if they have a share, as long as there are enough.
    """
    order = sorted(set(contents), key=lambda content: _place(content, seed))
    splits = {content: _split_at(_place(content, seed), shares) for content in order}

    def usable(split: str, most: int) -> list[bytes]:
        return list(itertools.islice((one for one in order if splits[one] == split and is_usable(one)), most))

    def move(giver: str, split: str, least: int) -> bool:
        """Give ``split`` the nearest content of another that has ``least`` usable ones."""
        found = usable(giver, len(order) if split == TRAIN else least)
        if len(found) >= least:
            splits[found[-1 if split == TRAIN else 0]] = split
        return len(found) >= least

    if not usable(TRAIN, 1):
        any(move(giver, TRAIN, least) for least in (2, 1) for giver in (TEST, DEV))
    if shares.get(DEV) and not usable(DEV, 1):
        any(move(giver, DEV, least) for giver, least in ((TRAIN, 2), (TEST, 1)))
    if shares.get(TEST) and not usable(TEST, 1):
        any(move(giver, TEST, 2) for giver in (TRAIN, DEV))
    return splits


def _place(content: bytes, seed: int) -> float:
    """A number from 0 to 1, as good as random."""
    return int.from_bytes(hashlib.sha256(f"{seed} ".encode() + content).digest()[:8], "big") / 2**64


def _split_at(place: float, shares: Mapping[str, float]) -> str:
    dev = shares.get(DEV, 0.0)
    return DEV if place < dev else TEST if place < dev + shares.get(TEST, 0.0) else TRAIN
