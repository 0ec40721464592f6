"""The target of the fuzz for shards that another program wrote: taken in by links and by copying, then read."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from PIL import Image

from benchmarks.proof.fuzz_target import Files, Target
from data_prep.filters import Limits
from data_prep.foreign.choosing import Choice
from data_prep.foreign.inputs import find_shards
from data_prep.foreign.linked import link_split
from data_prep.foreign.records import copied_records
from data_prep.prepare import fill_split
from data_prep.record import PrepError
from data_prep.shard_writer import SplitWriter
from pipeline.data.shard_reader import Corpus

_LIMITS, _CHOICE = Limits(max_pixels=64_000, max_image_bytes=1 << 20), Choice()


def foreign_shards() -> Target:
    made = {
        "in/0.tar": _tar(tarfile.PAX_FORMAT, "größe/"),
        "in/1.tar": _tar(tarfile.GNU_FORMAT, ""),
        "in/2.tar": _tar(tarfile.USTAR_FORMAT, "a/b/"),
    }

    def use(folder: Path, _: Files) -> str | Exception | None:
        shards, found = find_shards([folder / "in"]), None
        for name in ("linked", "copied"):
            caption_key = _CHOICE.key_in_json if name == "linked" else None
            writer = SplitWriter(folder / name / "train", name, "train", caption_key=caption_key)
            try:
                if name == "linked":
                    manifest = link_split(writer, shards, "train", _CHOICE, _LIMITS, 1)
                else:
                    records = copied_records(shards, "train", _CHOICE, _LIMITS.max_image_bytes)
                    manifest = fill_split(writer, records, _LIMITS, 1)
            except PrepError as error:
                found = error
                continue
            corpus = Corpus(folder / name / "train")
            for index in range(len(corpus)):  # what was judged can be read
                corpus.read(index)
            corpus.close()
            found = found or next(iter(manifest.rejected), None)
        return found

    return Target("foreign_shards", lambda _: dict(made), use, (PrepError,))


def _tar(tar_format: int, folder: str) -> bytes:
    stream, image = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (24, 16), (7, 9, 90)).save(image, "JPEG")
    with tarfile.open(fileobj=stream, mode="w", format=tar_format) as tar:
        for number in range(3):
            meta = json.dumps({"caption": ["one", "two"], "number": number}).encode()
            for suffix, content in (("jpg", image.getvalue()), ("txt", b"a caption"), ("json", meta)):
                if number or suffix != "txt":
                    info = tarfile.TarInfo(f"{folder}{number:09d}.{suffix}")
                    info.size, info.mtime = len(content), 1.5
                    tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()
