"""Which files of folders are pictures, by their endings."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

PICTURES = frozenset(".bmp .gif .jpeg .jpg .png .tif .tiff .webp".split())
CLIPS = frozenset(".avi .m4v .mkv .mov .mp4 .mpeg .mpg .webm".split())


def files_of(paths: Iterable[Path], endings: frozenset[str] = PICTURES) -> Iterator[Path]:
    """The paths in their order, for each folder the files with these endings in it and below, sorted by name.

    What is left out of a folder, hidden files apart, is counted in one line on stderr.
    """
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        files = [file for file in sorted(path.rglob("*")) if file.is_file() and not _is_hidden(file, path)]
        chosen = [file for file in files if file.suffix.lower() in endings]
        yield from chosen
        if left := len(files) - len(chosen):
            print(f"{path}: {len(chosen)} files taken, {left} skipped for their endings", file=sys.stderr)


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)
