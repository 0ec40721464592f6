"""Shards as other programs write them, for the tests."""

import io
import json
import tarfile
from pathlib import Path

from PIL import Image


def picture(number: int, image_format: str = "JPEG", size: tuple[int, int] = (32, 24)) -> bytes:
    """An image of one colour, that differs from number to number."""
    stream = io.BytesIO()
    Image.new("RGB", size, (7 * number % 256, 90, 255 - 5 * number % 256)).save(stream, image_format)
    return stream.getvalue()


def write_tar(path: Path, members, tar_format: int = tarfile.PAX_FORMAT) -> Path:
    """A tar of (name, content) pairs as Python's tarfile writes it; a TarInfo in the place of a name is taken as it
    is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def triples(numbers, folder: str = "", **of_json):
    """KEY.jpg, KEY.txt and KEY.json of each number, as in cc3m-wds and img2dataset's output."""
    for number in numbers:
        key = f"{folder}{number:09d}"
        yield f"{key}.jpg", picture(number)
        yield f"{key}.txt", f"caption {number}".encode()
        content = {"key": f"{number:09d}", "caption": f"caption {number}", "url": f"http://x/{number}", **of_json}
        yield f"{key}.json", json.dumps(content).encode()
