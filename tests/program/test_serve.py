"""Serving real runs: what comes over HTTP is what the model says in Python."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="serving needs its packages: pip install '.[serve]'")
pytest.importorskip("fastapi", reason="serving needs its packages: pip install '.[serve]'")

import openflm  # noqa: E402
from pipeline.serve import main  # noqa: E402
from tests.pipeline.data.test_reader import jpeg  # noqa: E402
from tests.pipeline.serving.serving import Served, served  # noqa: E402
from tests.tiny_runs import write_data, write_kind  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("serving") / "data")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for number in range(9):
        (tmp_path / "pictures" / f"{number}.jpg").write_bytes(jpeg(number))
    return tmp_path / "pictures"


def serve(run: Path, *options: str) -> Iterator[Served]:
    return served(run, "--device", "cpu", *options, main=main)


def abilities(server: Served) -> set[str]:
    found = json.loads(server.get("/model")[1])["abilities"]
    return {name for name, holds in found.items() if holds}


def events(body: bytes) -> list[str]:
    return [json.loads(line[6:])["caption"] for line in body.decode().splitlines() if line.startswith("data: ")]


def test_a_captioner(tmp_path: Path, data: Path, pictures: Path) -> None:
    run = write_kind(tmp_path / "run", data, "captioning")
    model = openflm.load(run, device="cpu")
    with serve(run, "--search", str(pictures)) as server:
        assert abilities(server) == {"caption", "match", "search", "attention"}
        for number in range(3):
            caption = model.caption(jpeg(number), beams=1)
            assert server.post("/caption", jpeg(number), beams="1") == (200, {"caption": caption})
            so_far = events(
                server.send("POST", "/caption?stream=true", jpeg(number), {"Content-Type": "image/jpeg"})[1]
            )
            assert so_far[-1] == caption and so_far[:-1] == list(model.caption_stream(jpeg(number)))
        texts = ["a red dog", "a blue cat is here"]
        code, found = server.post("/match", jpeg(0), text=texts)
        expected = model.match(jpeg(0), texts)
        assert code == 200 and found["meaning"] == model.match_meaning
        np.testing.assert_allclose([one["score"] for one in found["matches"]], expected, rtol=1e-4)
        words, maps = model.attention(jpeg(0), texts[0])
        code, found = server.post("/attention", jpeg(0), text=texts[0])
        assert found["words"] == words
        np.testing.assert_allclose(found["maps"], maps, atol=2e-5)
        assert search(server, "a red dog", 4) == expected_search(model, pictures, "a red dog", 4)
        assert server.post("/merges", jpeg(0))[0] == server.post("/answer", jpeg(0), question="x")[0] == 404


def search(server: Served, text: str, top: int) -> list[str]:
    until = time.monotonic() + 60
    while not json.loads(server.get("/search/status")[1])["done"]:
        assert time.monotonic() < until
        time.sleep(0.05)
    code, body = server.send("POST", "/search", json.dumps({"text": text, "top": top}).encode())
    assert code == 200
    return [one["name"] for one in json.loads(body)["results"]]


def expected_search(model: object, pictures: Path, text: str, top: int) -> list[str]:
    """By judging every picture alone."""
    paths = sorted(pictures.iterdir())
    scores = [float(model.match(path, text)) for path in paths]
    return [paths[number].name for number in sorted(range(len(paths)), key=lambda one: -scores[one])[:top]]


def test_answers_to_questions(tmp_path: Path, data: Path) -> None:
    run = write_kind(tmp_path / "run", data, "vqa")
    model = openflm.load(run, device="cpu")
    with serve(run) as server:
        assert "answer" in abilities(server) and "caption" not in abilities(server)
        code, found = server.post("/answer", jpeg(1), question="what colour is it", top="3")
        expected = model.answer(jpeg(1), "what colour is it", top=3)
        assert code == 200 and [one["answer"] for one in found["answers"]] == [answer for answer, _ in expected]
        np.testing.assert_allclose(
            [one["probability"] for one in found["answers"]], [p for _, p in expected], rtol=1e-4
        )


def test_a_language_model_whose_patches_are_merged(tmp_path: Path, data: Path) -> None:
    run = write_kind(tmp_path / "run", data, "evlgen_tome")
    model = openflm.load(run, device="cpu")
    with serve(run) as server:
        assert {"caption", "merges"} <= abilities(server) and "answer" not in abilities(server)
        assert server.post("/caption", jpeg(2)) == (200, {"caption": model.caption(jpeg(2))})
        assert server.post("/merges", jpeg(2)) == (200, {"merges": model.merges(jpeg(2)).tolist()})


def test_what_can_not_be_served_is_one_line(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for folder, says in (
        (tmp_path / "empty", "empty"),
        (write_kind(tmp_path / "nlvr2", data, "nlvr2"), "says nothing of single pictures"),
    ):
        with pytest.raises(AssertionError, match=says) as error:
            with serve(folder):
                pass
        assert str(error.value).count("error: ") == 1, str(error.value)
