"""The hashes of a split on disk: SPLIT/.hashes, or a copy of that folder elsewhere.

about.json     what they are hashes of, with which versions; written last
hashes.npy     uint64 [N], row s * I + i for image i of sample s; 0: this image has no hash
inner.npy      uint64 [N], hashes of the images without 5 % of each side; 0 as above
digests.npy    uint64 [N, 2], BLAKE2b of the encoded image
keys.npy       bytes [samples]
pictures.npy   uint8 [N, 1152], what the hashes are of (pictures.py)
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import features

from data_prep.manifest import load_manifest, sync_directory, write_atomically
from data_prep.npy import load_array
from data_prep.record import PrepError
from data_prep.similar.pictures import PICTURE_BYTES, VERSION
from data_prep.similar.split_samples import KEY_BYTES

FOLDER, ABOUT = ".hashes", "about.json"
ARRAYS = ("hashes", "inner", "digests", "keys", "pictures")


@dataclass(frozen=True)
class About:
    """What hashes are hashes of. ``commonest``: digest, count and a key of the images that come most often."""

    corpus: str
    split: str
    fingerprint: str
    samples: int
    num_images: int
    without_hash: int
    unreadable: int
    versions: dict[str, str]
    commonest: list[tuple[str, int, str]]
    hash_version: int = VERSION


class HashSet:
    """Hashes that were opened, mapped from disk."""

    def __init__(self, folder: Path, about: About, arrays: dict[str, np.ndarray]) -> None:
        self.folder, self.about = folder, about
        self.hashes, self.inner, self.digests, self.keys, self.pictures = (arrays[name] for name in ARRAYS)
        self.name = f"{about.corpus}/{about.split}"

    def key(self, row: int) -> str:
        """Key of the sample of image row ``row``."""
        return self.keys[row // self.about.num_images].decode("utf-8", "surrogateescape")


def versions() -> dict[str, str]:
    """Versions of all that decodes and shrinks an image."""
    decoders = {name: str(features.version(name)) for name in ("jpg", "webp")}
    return {"python": platform.python_version(), "numpy": version("numpy"), "pillow": version("pillow"), **decoders}


def has_hashes(folder: Path) -> bool:
    return (folder / ABOUT).is_file()


def open_hashes(folder: Path) -> HashSet:
    """The hashes in ``folder``; raises PrepError if they are missing, damaged or of another version."""
    try:
        content: dict[str, Any] = json.loads((folder / ABOUT).read_bytes())
        if content.get("hash_version") != VERSION:
            found = f"hashes of version {content.get('hash_version')!r}, this program makes {VERSION}"
            raise PrepError(f"{folder}: {found}; make them anew by `python -m data_prep hashes SPLIT`")
        about = About(**content)
        arrays = {name: load_array(folder / f"{name}.npy", mapped=True) for name in ARRAYS}
        for name, shape in _shapes(about.samples, about.num_images).items():
            if arrays[name].shape != shape:
                raise ValueError(f"{name}.npy holds {arrays[name].shape}, expected {shape}")
    except PrepError:
        raise
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise PrepError(f"{folder}: no readable hashes ({error}); make them by `python -m data_prep hashes`") from error
    return HashSet(folder, about, arrays)


def _shapes(samples: int, num_images: int) -> dict[str, tuple[int, ...]]:
    count = samples * num_images
    shapes = {"hashes": (count,), "inner": (count,), "digests": (count, 2), "keys": (samples,)}
    return {**shapes, "pictures": (count, PICTURE_BYTES)}


def stale_reason(split_dir: Path) -> str | None:
    """Why the hashes of a split must be made, or None if they are those of its samples."""
    folder = split_dir / FOLDER
    if not has_hashes(folder):
        return "there are none"
    try:
        about = open_hashes(folder).about
    except PrepError as error:
        return str(error)
    if about.fingerprint != load_manifest(split_dir).fingerprint():
        return "the split has changed since"
    return None if about.versions == versions() else f"made with {about.versions}, here are {versions()}"


class HashWriter:
    """Writes hashes into a hidden folder beside ``folder``, and puts it in place when they are whole."""

    def __init__(self, folder: Path, samples: int, num_images: int) -> None:
        self._folder, self._beside = folder, folder.with_name(f"{folder.name}.{os.getpid()}.part")
        self._beside.mkdir(parents=True)
        self._images = num_images
        types = {"keys": f"S{KEY_BYTES}", "pictures": "u1"}
        self._arrays = {
            name: np.lib.format.open_memmap(self._beside / f"{name}.npy", "w+", np.dtype(types.get(name, "<u8")), shape)
            for name, shape in _shapes(samples, num_images).items()
        }
        self._filled = 0

    def __enter__(self) -> HashWriter:
        return self

    @property
    def hashes(self) -> np.ndarray:
        return self._arrays["hashes"]

    @property
    def digests(self) -> np.ndarray:
        return self._arrays["digests"]

    @property
    def keys(self) -> np.ndarray:
        return self._arrays["keys"]

    def add(self, keys: list[bytes], **of_images: np.ndarray) -> None:
        """Further samples, in the order of the split: their keys, and each other array by its name."""
        rows = slice(self._filled * self._images, (self._filled + len(keys)) * self._images)
        for name, values in of_images.items():
            self._arrays[name][rows] = values
        self._arrays["keys"][self._filled : self._filled + len(keys)] = keys
        self._filled += len(keys)

    def finish(self, about: About) -> None:
        for array in self._arrays.values():
            array.flush()
        write_atomically(self._beside / ABOUT, json.dumps(asdict(about), indent=1) + "\n")
        shutil.rmtree(self._folder, ignore_errors=True)
        os.rename(self._beside, self._folder)
        sync_directory(self._folder.parent)

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._beside, ignore_errors=True)


def export(found: HashSet, folder: Path) -> Path:
    """Copy hashes to ``folder``/CORPUS_SPLIT, from where they serve without the split; that folder."""
    target = folder / f"{found.about.corpus}_{found.about.split}"
    beside = folder / f".{target.name}.{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    if target.exists() and not has_hashes(target):
        raise PrepError(f"{target}: holds something else than hashes; give another --export")
    shutil.copytree(found.folder, beside)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(beside, target)
    return target
