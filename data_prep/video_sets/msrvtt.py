"""Reads MSR-VTT's annotation files: train_val_videodatainfo.json and test_videodatainfo.json, or one file of all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.annotations.annotated import Annotated, AnnotatedSplit
from data_prep.annotations.files import BadEntry, entries_of, file_name, read_object, text
from data_prep.record import Rejection

SPLIT_OF = {"train": "train", "validate": "dev", "val": "dev", "test": "test"}
FOLDERS = ("", "TrainValVideo/", "TestVideo/", "all/")  # of the published archives
EXTENSIONS = ("mp4", "webm", "mkv", "avi", "mov")
_EXPECTED = "MSR-VTT's videos and sentences as in train_val_videodatainfo.json"


def read_msrvtt(paths: Sequence[Path], with_validation: bool = False) -> list[AnnotatedSplit]:
    """The splits train, dev (``validate``) and test, a clip with all its captions.

    ``with_validation`` adds the clips of dev to train and leaves no dev, as papers on captioning do. Raises PrepError.
    """
    splits = {
        name: AnnotatedSplit(name, [], [], {"videos": 0, "captions": 0}, videos=True)
        for name in ("train", "dev", "test")
    }
    clips: dict[str, tuple[AnnotatedSplit, Annotated]] = {}
    for path in paths:
        content = read_object(path, _EXPECTED)
        videos, sentences = (entries_of(content, name, path, _EXPECTED) for name in ("videos", "sentences"))
        for number, entry in enumerate(videos):
            try:
                split, clip = _clip(entry, clips, splits, with_validation)
            except BadEntry as error:
                splits["train"].problems.append(Rejection(error.reason, f"{path.name} video {number}", error.detail))
                continue
            clips[clip.key] = split, clip
            split.images.append(clip)
            split.counts["videos"] += 1
        for number, entry in enumerate(sentences):
            _add_caption(entry, f"{path.name} sentence {number}", clips, splits["train"])
    for split in splits.values():
        without = [clip for clip in split.images if not clip.captions]
        split.problems += [Rejection("empty_caption", clip.key, "no sentence") for clip in without]
        split.images = [clip for clip in split.images if clip.captions]
    return [split for split in splits.values() if split.images or split.problems]


def _clip(
    entry: Any,
    clips: dict[str, tuple[AnnotatedSplit, Annotated]],
    splits: dict[str, AnnotatedSplit],
    with_validation: bool,
) -> tuple[AnnotatedSplit, Annotated]:
    video_id, own = file_name(entry, "video_id"), text(entry, "split")
    if own not in SPLIT_OF:
        raise BadEntry("unknown_split", f"split {own!r} of {video_id}, expected one of {', '.join(SPLIT_OF)}")
    if video_id in clips:
        raise BadEntry("duplicate_id", f"{video_id} comes again; the earlier video counts")
    name = "train" if with_validation and SPLIT_OF[own] == "dev" else SPLIT_OF[own]
    files = tuple(f"{folder}{video_id}.{extension}" for extension in EXTENSIONS for folder in FOLDERS)
    meta = {"image_id": video_id, "msrvtt_split": own}
    return splits[name], Annotated(video_id, (files,), (f"msrvtt/{video_id}",), meta)


def _add_caption(
    entry: Any, name: str, clips: dict[str, tuple[AnnotatedSplit, Annotated]], spare: AnnotatedSplit
) -> None:
    """Give a sentence to its clip; what can't be used is a problem of its split, or of ``spare``."""
    split = spare
    try:
        video_id = text(entry, "video_id")
        if video_id not in clips:
            raise BadEntry("unknown_video", f"video {video_id!r} is not among the videos")
        split, clip = clips[video_id]
        split.counts["captions"] += 1
        clip.add(text(entry, "caption"))
    except BadEntry as error:
        split.problems.append(Rejection(error.reason, name, error.detail))
