"""Reads SBU's captioned photographs: two parallel lists of lines, or the JSON of the same lists."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

from data_prep.filters import caption_problem
from data_prep.record import MissingInput, PrepError, Rejection, UrlRow, in_one_line
from data_prep.sources.tables import open_bytes

URLS = "SBU_captioned_photo_dataset_urls.txt"
CAPTIONS = "SBU_captioned_photo_dataset_captions.txt"
_EXPECTED = f"{URLS} and {CAPTIONS} in a folder or tar, or sbu-captions-all.json"
_MAX_MEMBER_BYTES = 2 << 30  # the published lists have about 100 MB


def sbu_files(path: Path) -> list[Path]:
    """The files that are read for the input ``path``: itself, or the two lists of a folder; raises PrepError."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise MissingInput(f"{path}: no such file; expected {_EXPECTED}")
    for folder in (path, path / "SBUCaptionedPhotoDataset", path / "dataset"):
        if (folder / URLS).is_file() and (folder / CAPTIONS).is_file():
            return [folder / URLS, folder / CAPTIONS]
    found = sorted(entry.name for entry in path.iterdir())[:5]
    alone = [path / name for name in ("sbu-captions-all.json", "sbu-captions-all.tar.gz") if (path / name).is_file()]
    if not alone:
        raise MissingInput(f"{path}: found {', '.join(found) or 'nothing'}; expected {_EXPECTED}")
    return alone[:1]


def sbu_rows(files: list[Path]) -> Iterator[UrlRow | Rejection]:
    """A row for each pair of lines; raises PrepError where there are more of one kind than of the other."""
    urls, captions = _lists(files)
    if len(urls) != len(captions):
        raise PrepError(
            f"{files[0]}: {len(urls):,} addresses and {len(captions):,} captions, expected as many; download it again"
        )
    for number, (url, caption) in enumerate(zip(urls, captions)):
        name = f"row {number}: {ascii(url)[1:201]}"
        if not isinstance(url, str) or not url.strip().lower().startswith(("http://", "https://")):
            yield Rejection("bad_url", name)
        elif not isinstance(caption, str | None):
            yield Rejection("malformed_row", name, f"the caption is of type {type(caption).__name__}")
        elif problem := caption_problem(caption) or (caption_problem(url) and "invalid_utf8"):
            yield Rejection(problem, name, ascii(caption)[:80])
        else:
            yield UrlRow(number, url.strip(), (caption,), {})


def _lists(files: list[Path]) -> tuple[list, list]:
    try:
        if len(files) == 2:
            return _lines(files[0].read_bytes()), _lines(files[1].read_bytes())
        if tarfile.is_tarfile(files[0]):
            return _of_tar(files[0])
        with open_bytes(files[0]) as stream:
            return _of_json(files[0], stream.read())
    except (OSError, EOFError, tarfile.TarError) as error:
        raise PrepError(f"{files[0]}: cannot be read ({in_one_line(error)}); download it again") from error


def _of_tar(path: Path) -> tuple[list, list]:
    found: dict[str, bytes] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            name = member.name.rpartition("/")[2]
            if member.isreg() and (name in (URLS, CAPTIONS) or name.endswith(".json")):
                if member.size > _MAX_MEMBER_BYTES:
                    raise PrepError(f"{path}: {name} has {member.size:,} bytes, expected at most {_MAX_MEMBER_BYTES:,}")
                stream = tar.extractfile(member)
                assert stream is not None
                found[name] = stream.read()
    if URLS in found and CAPTIONS in found:
        return _lines(found[URLS]), _lines(found[CAPTIONS])
    documents = [name for name in found if name.endswith(".json")]
    if len(documents) != 1:
        raise PrepError(f"{path}: expected {_EXPECTED}")
    return _of_json(path, found[documents[0]])


def _of_json(path: Path, content: bytes) -> tuple[list, list]:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise PrepError(f"{path}: not readable as JSON ({in_one_line(error)}); expected {_EXPECTED}") from error
    lists = [document.get(name) for name in ("image_urls", "captions")] if isinstance(document, dict) else []
    if len(lists) != 2 or not all(isinstance(one, list) for one in lists):
        raise PrepError(f'{path}: expected the lists "image_urls" and "captions" as in sbu-captions-all.json')
    return lists[0], lists[1]


def _lines(content: bytes) -> list[str]:
    """Lines end at a line feed alone; a caption may hold other separators."""
    with io.TextIOWrapper(io.BytesIO(content), "utf-8-sig", "surrogateescape", newline="\n") as stream:
        return [line.rstrip("\r\n") for line in stream]
