"""What each endpoint answers."""

from __future__ import annotations

import io
import json
import time

import numpy as np
import pytest
from PIL import Image

from tests.pipeline.serving.serving import Served, multipart, picture

RED = picture("red")


def test_a_picture_in_a_form_or_alone_has_the_same_caption(server: Served) -> None:
    expected = {"caption": "see a red thing on a quiet background"}
    assert server.post("/caption", RED, prompt="see") == (200, expected)
    for form in ("PNG", "JPEG", "WEBP", "BMP", "GIF"):
        headers = {"Content-Type": f"image/{form.lower()}"}
        code, body = server.send("POST", "/caption?prompt=see", picture("red", form=form), headers)
        assert (code, json.loads(body)) == (200, expected), form


def test_a_stream_gives_the_caption_word_by_word(server: Served) -> None:
    code, body = server.send("POST", "/caption?stream=true&max_tokens=3", RED, {"Content-Type": "image/png"})
    so_far = ("a", "a red", "a red thing")
    expected = "".join(f'data: {{"caption": "{text}"}}\n\n' for text in so_far)
    assert (code, body.decode()) == (200, expected + 'event: done\ndata: {"caption": "a red thing"}\n\n')


def test_answers(server: Served) -> None:
    likely, other = {"answer": "red", "probability": 0.75}, {"answer": "none", "probability": 0.25}
    assert server.post("/answer", RED, question="which colour?") == (200, {"answers": [likely]})
    assert server.post("/answer", RED, question="which colour?", top="2") == (200, {"answers": [likely, other]})


def test_matches(server: Served) -> None:
    code, found = server.post("/match", RED, text=["a red box", "a green one"])
    assert code == 200 and [one["score"] for one in found["matches"]] == [1.0, 0.0]
    assert found["meaning"] == "1 where the text names the colour"


def test_attention_and_merges(server: Served) -> None:
    code, found = server.post("/attention", RED, text="a red box")
    assert code == 200 and found["words"] == ["a", "red", "box"] and np.shape(found["maps"]) == (3, 4, 4)
    assert server.post("/merges", RED) == (200, {"merges": (np.arange(16).reshape(4, 4) // 3).tolist()})


def test_what_the_model_is(server: Served) -> None:
    card = json.loads(server.get("/model")[1])
    assert (card["name"], card["image_size"], card["max_bytes"]) == ("a fake model", 32, 200_000)
    assert card["abilities"] == dict.fromkeys(("caption", "answer", "match", "search", "attention", "merges"), True)


def test_a_folder_is_searched_by_a_sentence(server: Served) -> None:
    until = time.monotonic() + 20
    while not (status := json.loads(server.get("/search/status")[1]))["done"]:
        assert time.monotonic() < until, status
    assert status == {"total": 4, "indexed": 3, "refused": 1, "done": True}  # the links are not even counted
    code, body = server.send("POST", "/search", json.dumps({"text": "a green box", "top": 1}).encode())
    (best,) = json.loads(body)["results"]
    assert code == 200 and best["name"] == "1.png" and best["score"] == 1.0
    code, jpeg = server.get(f"/search/pictures/{best['number']}")
    assert code == 200 and Image.open(io.BytesIO(jpeg)).getpixel((5, 5))[1] > 100


def test_fields_that_can_not_be_are_refused_in_one_line(server: Served) -> None:
    for path, fields, says in (
        ("/caption", {"beams": "11"}, "beams '11'; expected a whole number from 1 to 10"),
        ("/caption", {"max_tokens": "-1"}, "expected a whole number"),
        ("/caption", {"prompt": "x" * 1001}, "at most 1000"),
        ("/caption?stream=true", {"beams": "3"}, "without beams"),
        ("/caption?stream=perhaps", {}, "stream"),
        ("/caption", {"prompt": "refuse"}, "this prompt is refused"),
        ("/caption?stream=true", {"prompt": "refuse"}, "this prompt is refused"),
        ("/answer", {}, "no question"),
        ("/match", {}, "found 0 texts"),
        ("/match", {"text": ["x"] * 33}, "found 33 texts"),
        ("/attention", {}, "no text"),
    ):
        code, found = server.post(path, RED, **fields)
        assert code == 422 and says in found["detail"] and "\n" not in found["detail"], (path, fields, found)
    for body in (b"", b"{", b'{"text": ""}', b'{"text": "x", "top": 0}', b"[]", b'{"text": "\xff"}'):
        assert server.send("POST", "/search", body)[0] == 422, body


def test_one_question_that_fails_does_not_fail_those_beside_it(server: Served) -> None:
    assert server.post("/answer", RED, question="refuse") == (422, {"detail": "this question is refused"})
    code, found = server.post("/answer", RED, question="crash")
    assert code == 500 and "RuntimeError" in found["detail"]
    assert server.post("/answer", RED, question="and now?")[0] == 200


def test_paths_that_are_not_there(server: Served) -> None:
    for path in ("/nothing", "/search/pictures/99", "/search/pictures/-1", "/page/page.js", "/docs/../model"):
        assert server.get(path)[0] == 404, path
    assert server.get("/caption")[0] == 405
    assert server.metric('openflm_requests_total{path="other",code="404"}') >= 3


def test_pages_load_nothing_from_elsewhere(server: Served) -> None:
    for path in ("/", "/docs"):
        with server.open("GET", path) as response:
            text, policy = response.read().decode(), response.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "style-src 'sha256-" in policy
        assert "http://" not in text.replace("http://www.w3.org/2000/svg", "") and "https://" not in text
    description = json.loads(server.get("/openapi.json")[1])
    assert "multipart/form-data" in description["paths"]["/caption"]["post"]["requestBody"]["content"]
    assert "POST /match" in text and "up to 32" in text


def test_metrics_are_readable_and_count(server: Served) -> None:
    before = server.metric('openflm_requests_total{path="/merges",code="200"}')
    server.post("/merges", RED)
    assert server.metric('openflm_requests_total{path="/merges",code="200"}') == before + 1
    lines = server.get("/metrics")[1].decode().splitlines()
    for line in lines:
        assert line.startswith("# ") or len(line.rsplit(" ", 1)) == 2 and float(line.rsplit(" ", 1)[1]) >= 0, line
    counts = [line for line in lines if line.startswith('openflm_request_seconds_bucket{path="/merges"')]
    assert [float(line.split()[-1]) for line in counts] == sorted(float(line.split()[-1]) for line in counts)
    assert counts[-1].endswith(f" {int(before) + 1}") and 'le="+Inf"' in counts[-1]


@pytest.mark.parametrize("body", [multipart(None, {"prompt": "x"}), multipart(None, {"image": "a text"})])
def test_a_form_without_a_picture(server: Served, body: bytes) -> None:
    code, found = server.send("POST", "/caption", body, {"Content-Type": "multipart/form-data; boundary=a-boundary"})
    assert code == 422 and b"no picture" in found
