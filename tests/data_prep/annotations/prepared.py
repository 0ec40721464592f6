"""Small images, annotation files, and what a prepared split holds, for the tests of this folder."""

import io
import json
import tarfile
from pathlib import Path

from PIL import Image

from data_prep.__main__ import main
from data_prep.checks.verify import Limits, verify_split
from data_prep.manifest import read_manifest


def picture(number: int, image_format: str = "JPEG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (20, 20), (number % 256, number // 256, 99)).save(stream, image_format)
    return stream.getvalue()


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_json(path: Path, content) -> Path:
    put(path, json.dumps(content).encode())
    return path


def write_lines(path: Path, rows, end: str = "\n") -> Path:
    put(path, ("\n".join(json.dumps(row) for row in rows) + end).encode())
    return path


def prepare(*arguments) -> int:
    return main([*map(str, arguments), "--workers", "1"])


def metas(split_dir: Path) -> list[dict]:
    """KEY.json of every sample of a split without problems, in order."""
    assert verify_split(split_dir, Limits(), 1).problems == []
    found = []
    for shard in read_manifest(split_dir).shards:
        with tarfile.open(split_dir / shard.file) as tar:
            found += [json.load(tar.extractfile(member)) for member in tar if member.name.endswith(".json")]
    return found


def images(split_dir: Path) -> dict[str, bytes]:
    with tarfile.open(split_dir / "00000.tar") as tar:
        return {m.name: tar.extractfile(m).read() for m in tar if not m.name.endswith((".json", ".txt"))}


def rejected(split_dir: Path) -> list[tuple[str, str, int]]:
    """(reason, name, rows) of every line of a split's list of what was not kept."""
    lines = (split_dir / "rejected.jsonl").read_text().splitlines()
    return [(row["reason"], row["name"], row["rows"]) for row in map(json.loads, lines)]


def overlap(*folders: Path) -> int:
    return main(["overlap", *map(str, folders)])
