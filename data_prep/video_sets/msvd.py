"""Reads MSVD's AllVideoDescriptions.txt and the lists of its splits."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from data_prep.annotations.annotated import Annotated, AnnotatedSplit
from data_prep.record import PrepError, Rejection

# Clips vid1 to vid1970 of youtube_mapping.txt, split in this order by Venugopalan et al. (2015).
NUMBERED = {"train": range(1, 1201), "dev": range(1201, 1301), "test": range(1301, 1971)}
EXTENSIONS = ("avi", "mp4", "webm", "mkv", "mov")
FOLDERS = ("", "YouTubeClips/")
_CLIP = re.compile(r"[\w-]+_\d+_\d+", re.ASCII)  # a video of YouTube, and the seconds between which it is cut


def read_msvd(descriptions: Path, lists: Mapping[str, Path], mapping: Path | None = None) -> list[AnnotatedSplit]:
    """The splits that have a list of clips, one a line, or those of ``mapping`` (youtube_mapping.txt).

    Raises PrepError, also where no description is readable.
    """
    members = _numbered(mapping) if mapping is not None else {name: _names(path) for name, path in lists.items()}
    splits = {name: AnnotatedSplit(name, [], [], {"videos": 0, "captions": 0}, videos=True) for name in members}
    clips: dict[str, tuple[AnnotatedSplit, Annotated]] = {}
    for name, (names, problems) in members.items():
        split = splits[name]
        split.problems += problems
        for clip in names:
            if clip in clips:
                split.problems.append(Rejection("duplicate_id", clip, "listed twice; the earlier entry counts"))
                continue
            files = tuple(f"{folder}{clip}.{extension}" for extension in EXTENSIONS for folder in FOLDERS)
            clips[clip] = split, Annotated(clip, (files,), (f"msvd/{clip}",), {"image_id": clip})
            split.images.append(clips[clip][1])
            split.counts["videos"] += 1
    first = next(iter(splits.values()))
    first.problems += _add_descriptions(descriptions, clips, all_listed=set(splits) == set(NUMBERED))
    for split in splits.values():
        without = [clip for clip in split.images if not clip.captions]
        split.problems += [Rejection("empty_caption", clip.key, "no description") for clip in without]
        split.images = [clip for clip in split.images if clip.captions]
    return list(splits.values())


def _add_descriptions(
    path: Path, clips: Mapping[str, tuple[AnnotatedSplit, Annotated]], all_listed: bool
) -> list[Rejection]:
    """Give each description to its clip; returns lines that are none, and where all splits are listed those of clips in
    none of them."""
    problems, found = [], 0
    for number, line in _lines(path):
        name, _, caption = line.partition(" ")
        if _CLIP.fullmatch(name) is None:
            detail = f"{ascii(line[:80])}, expected VIDEO_START_END and a caption"
            problems.append(Rejection("malformed_row", f"{path.name} line {number}", detail))
            continue
        found += 1
        if name in clips:
            split, clip = clips[name]
            clip.add(caption)
            split.counts["captions"] += 1
        elif all_listed:
            problems.append(Rejection("unknown_split", f"{path.name} line {number}", f"{name} is in no list"))
    if not found:
        raise PrepError(f"{path}: no line VIDEO_START_END CAPTION, expected MSVD's AllVideoDescriptions.txt")
    return problems


def _names(path: Path) -> tuple[list[str], list[Rejection]]:
    """The clips of a list, and the lines that name none; a file's extension may follow the name."""
    names, problems = [], []
    for number, line in _lines(path):
        name = line.strip().removesuffix(".avi").removesuffix(".mp4")
        if _CLIP.fullmatch(name):
            names.append(name)
        else:
            problems.append(Rejection("malformed_row", f"{path.name} line {number}", ascii(line[:80])))
    if not names:
        raise PrepError(f"{path}: no line VIDEO_START_END, expected a list of MSVD's clips")
    return names, problems


def _numbered(path: Path) -> dict[str, tuple[list[str], list[Rejection]]]:
    """The splits by the numbers of youtube_mapping.txt, lines ``VIDEO_START_END vidN``."""
    splits: dict[str, tuple[list[str], list[Rejection]]] = {name: ([], []) for name in NUMBERED}
    for number, line in _lines(path):
        name, _, alias = line.strip().partition(" ")
        place = int(alias[3:]) if re.fullmatch(r"vid\d{1,9}", alias, re.ASCII) else 0
        split = next((one for one, numbers in NUMBERED.items() if place in numbers), None)
        if split is None or _CLIP.fullmatch(name) is None:
            splits["train"][1].append(Rejection("malformed_row", f"{path.name} line {number}", ascii(line[:80])))
        else:
            splits[split][0].append(name)
    if not any(names for names, _ in splits.values()):
        raise PrepError(f"{path}: no line VIDEO_START_END vidN, expected MSVD's youtube_mapping.txt")
    return splits


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of the lines that are neither blank nor a comment; bytes that are no UTF-8 as surrogates."""
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip() and not line.startswith("#"):
                    yield number, line.rstrip("\r\n")
    except FileNotFoundError:
        raise PrepError(f"{path}: no such file") from None
