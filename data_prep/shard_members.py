"""How the members of a tar make a sample: its key, the field of each, its captions, in our shards and in others'."""

from __future__ import annotations

import hashlib
import re
import tarfile
from pathlib import PurePath
from typing import Any

HEADER_BYTES = tarfile.BLOCKSIZE
FIELD_OF = {"txt": "text", "caption": "text", "text": "text", "json": "meta"}  # by extension; all others are images
FIELD_OF |= dict.fromkeys(("mp4", "webm", "mkv", "avi", "mov"), "video")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff")  # of others' shards
_MAX_KEY_LENGTH = 80


def field_of(name: str) -> str:
    """The field of a member by the last extension of its name, upper case or lower: text, meta, video or image."""
    return FIELD_OF.get(name.rpartition(".")[2].lower(), "image")


def key_and_suffix(name: str) -> tuple[str, str] | None:
    """Key and suffix of a member, as webdataset has them; None for a name without key.

    The key ends at the first dot of the name without its folders, and holds the folders; the suffix is in lower case:
    ``a.b/001.Seg.PNG`` gives ("a.b/001", "seg.png").
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    return (folder + slash + stem, suffix.lower()) if stem and dot else None


def header_name(header: bytes, size: int) -> str:
    """The name in the tar header before a member, which must be a plain file of ``size`` bytes.

    POSIX ustar: name 0-99, size 124-135, checksum 148-155, type 156, magic 257-261, directory prefix 345-499; GNU's
    headers have the same but the prefix. A longer name stands in another block before, and is cut here. Raises
    ValueError("index does not fit shard") or ValueError("not a regular file").
    """
    try:
        name = header[:100].rstrip(b"\0").decode("utf-8")
        found_size, checksum = (int(header[a:b].strip(b" \0") or b"0", 8) for a, b in ((124, 136), (148, 156)))
    except ValueError:  # UnicodeDecodeError is one
        raise ValueError("index does not fit shard") from None
    if header[257:262] != b"ustar" or sum(header) - sum(header[148:156]) + 8 * ord(" ") != checksum:
        raise ValueError("index does not fit shard")
    if header[156:157] not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise ValueError("not a regular file")
    if found_size != size:
        raise ValueError("index does not fit shard")
    if header[257:263] == b"ustar\0" and header[345:346] != b"\0":
        name = header[345:500].rstrip(b"\0").decode("utf-8", "replace") + "/" + name
    return name


def safe_key(key: str) -> str:
    """A tar member's stem: letters, digits, ``_`` and ``-`` only (webdataset ends a key at the first dot)."""
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", key)
    if len(safe) > _MAX_KEY_LENGTH or not safe:
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        safe = f"{safe[: _MAX_KEY_LENGTH - 17]}_{digest}"
    return safe


def foreign_key(split: str, shard_file: str, key: str) -> str:
    """Which sample of another program's shards it is, since their keys repeat from shard to shard: SPLIT_SHARD_KEY."""
    return safe_key(f"{split}_{PurePath(shard_file).stem}_{key}")


def in_own_form(meta: dict[str, Any] | None, text: str | None, caption_key: str | None) -> dict[str, Any] | None:
    """The metadata of a row as our shards have them, its captions under ``captions``.

    ``caption_key`` is that of the manifest: None leaves them as they are. Else the captions are ``text`` where the row
    has one, or what stands under that key, one text or a list. White space is collapsed, as it is in our shards.
    """
    if caption_key is None:
        return meta
    found = (meta or {}).get(caption_key) if text is None else text
    captions = found if isinstance(found, list) else [] if found is None else [found]
    return {**(meta or {}), "captions": [tidy(one) if isinstance(one, str) else one for one in captions]}


def tidy(caption: str) -> str:
    """A caption without a byte-order mark, its white space collapsed."""
    return " ".join(caption.removeprefix("\ufeff").split())


def row_text(text: str | None, meta: dict[str, Any] | None, caption_number: int) -> str:
    """The caption of a row by the rule of ``index_columns``; raises ValueError where the members do not hold it."""
    captions = (meta or {}).get("captions")
    if captions is None:
        if text is None:
            raise ValueError("sample has neither captions nor a text member")
        return text
    if not isinstance(captions, list) or not 0 <= caption_number < len(captions):
        raise ValueError(f"captions of the JSON member do not hold number {caption_number}")
    if not isinstance(captions[caption_number], str):
        raise ValueError(f"caption number {caption_number} is not a string")
    return captions[caption_number]
