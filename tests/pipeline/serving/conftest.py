"""Skips the tests of the server where its packages are missing, and starts one server for tests that share it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="serving needs its packages: pip install '.[serve]'")
pytest.importorskip("fastapi", reason="serving needs its packages: pip install '.[serve]'")

from tests.pipeline.serving.serving import Served, picture, served  # noqa: E402

COLOURS = ("red", "green", "blue")


@pytest.fixture(scope="package")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to search: three pictures, one of them in a folder below, a file that is none, and ways out."""
    outside = tmp_path_factory.mktemp("outside")
    (outside / "secret.png").write_bytes(picture("white"))
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "below").mkdir()
    for place, colour in zip(("0.png", "1.png", "below/2.png"), COLOURS):
        (folder / place).write_bytes(picture(colour))
    (folder / "damaged.jpg").write_bytes(b"\xff\xd8\xff nothing")
    (folder / "link.png").symlink_to(outside / "secret.png")
    (folder / "linked").symlink_to(outside)
    return folder


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Iterator[Served]:
    options = "--max-bytes 200000 --max-pixels 1000000 --timeout 3 --queue 16 --batch-size 4".split()
    with served(tmp_path_factory.mktemp("run"), *options, "--search", str(pictures)) as found:
        yield found
