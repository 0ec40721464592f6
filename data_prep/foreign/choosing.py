"""Chooses which members of a foreign sample are its images, its captions, its metadata."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, BinaryIO

from data_prep.foreign.tar_samples import Member, TarSample
from data_prep.record import Rejection
from data_prep.shard_members import IMAGE_EXTENSIONS, field_of, in_own_form

DEFAULT_CAPTION_KEY = "caption"
MAX_TEXT_BYTES = 16 << 20


@dataclass(frozen=True)
class Choice:
    """Members by what follows the key, with their format or without: "jpg", "image.jpg", "image".

    ``images``: one for each image of a sample; none where a sample has a single one. ``caption``: the text; None where
    there is a single one. ``caption_key``: of the JSON, before any text; None: "caption", where there is no text.
    """

    images: tuple[str, ...] = ()
    caption: str | None = None
    caption_key: str | None = None

    @property
    def num_images(self) -> int:
        return max(1, len(self.images))

    @property
    def key_in_json(self) -> str:
        return self.caption_key or DEFAULT_CAPTION_KEY


@dataclass(frozen=True)
class ForeignSample:
    """What a sample holds: ``text`` only where the caption is there, ``meta`` only where it can be read.

    ``captions`` may hold things that are no texts: they are still to be judged.
    """

    key: str
    images: tuple[Member, ...]
    text: Member | None
    meta: Member | None
    content: dict[str, Any]
    captions: list[Any]


class _Unusable(ValueError):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


def choose(sample: TarSample, choice: Choice, stream: BinaryIO, shard: str) -> ForeignSample | Rejection:
    """The members of a sample that count, its texts read from the tar ``stream``."""
    try:
        if sample.problems:
            raise _Unusable("not_a_plain_member", sample.problems[0])
        images = _images(sample, choice)
        meta = _single(sample, "meta", "json", "several JSON members")
        content = None if meta is None else _object(_read(stream, meta))
        return _with_captions(sample, choice, images, None if content is None else meta, content or {}, stream)
    except _Unusable as error:
        return Rejection(error.reason, f"{shard}: {sample.key}", error.detail[:200])


def _images(sample: TarSample, choice: Choice) -> tuple[Member, ...]:
    found = {name: member for name, member in sample.members.items() if name.rpartition(".")[2] in IMAGE_EXTENSIONS}
    if choice.images:
        return tuple(_named(found, name, "no_image_in_sample") for name in choice.images)
    if not found:
        raise _Unusable("no_image_in_sample", _listed(sample.members))
    if len(found) > 1:
        raise _Unusable("ambiguous_sample", f"images {_listed(found)}: a key ends at its first dot; --image-members?")
    return tuple(found.values())


def _named(members: dict[str, Member], wanted: str, reason: str) -> Member:
    names = [name for name in members if wanted.lower() in (name, name.rpartition(".")[0])]
    if len(names) != 1:
        raise _Unusable("ambiguous_sample" if names else reason, f"{wanted} of {_listed(members)}")
    return members[names[0]]


def _single(sample: TarSample, field: str, usual: str, problem: str) -> Member | None:
    """The member of a field: the only one, or that which is called ``usual``."""
    found = {name: member for name, member in sample.members.items() if field_of(name) == field}
    if len(found) > 1 and usual not in found:
        raise _Unusable("ambiguous_sample", f"{problem} {_listed(found)}: a key ends at its first dot")
    return found.get(usual) or next(iter(found.values()), None)


def _with_captions(
    sample: TarSample,
    choice: Choice,
    images: tuple[Member, ...],
    meta: Member | None,
    content: dict[str, Any],
    stream: BinaryIO,
) -> ForeignSample:
    in_json = choice.caption_key is not None and content.get(choice.caption_key) is not None
    text = None if in_json else _text_member(sample, choice)
    written = None
    if text is not None:
        try:
            written = _read(stream, text).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _Unusable("invalid_utf8", f"{text.name!r}: {error}") from error
    captions = (in_own_form(content, written, choice.key_in_json) or {})["captions"]
    if not captions:
        keys = ", ".join(content) or "none"
        raise _Unusable("empty_caption", f"no text among {_listed(sample.members)}; keys of its JSON: {keys}")
    return ForeignSample(sample.key, images, text, meta, content, captions)


def _text_member(sample: TarSample, choice: Choice) -> Member | None:
    texts = {name: member for name, member in sample.members.items() if field_of(name) == "text"}
    if choice.caption is not None:
        return _named(texts, choice.caption, "empty_caption") if texts else None
    if len(texts) > 1:
        raise _Unusable("ambiguous_sample", f"texts {_listed(texts)}; --caption-member?")
    return next(iter(texts.values()), None)


def _object(data: bytes) -> dict[str, Any] | None:
    """The object in a JSON member, NaN as null; None where there is none."""
    try:
        content = json.loads(data, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise _Unusable("invalid_utf8", f"half a surrogate pair in its JSON: {error}") from error
    return content if isinstance(content, dict) else None


def _read(stream: BinaryIO, member: Member) -> bytes:
    if member.size > MAX_TEXT_BYTES:
        raise _Unusable("text_too_large", f"{member.name!r} of {member.size} bytes")
    stream.seek(member.offset)
    return stream.read(member.size)


def _listed(members: dict[str, Member]) -> str:
    return ", ".join(list(members)[:8]) or "nothing"
