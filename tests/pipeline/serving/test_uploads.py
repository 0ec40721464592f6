"""Uploads that are malformed, huge, slow or truncated end in 4xx, in bounded memory and time."""

from __future__ import annotations

import io
import json
import os
import select
import socket
import time
import zlib
from contextlib import ExitStack
from pathlib import Path

import pytest
from PIL import Image

from data_prep.images import TRAINING_FORMATS, image_problems, open_image, upright_rgb
from pipeline.serving.uploads import KEPT_PIXELS, UPLOADS, decode
from tests.pipeline.serving.serving import BOUNDARY, Served, multipart, picture, served

PNG = {"Content-Type": "image/png"}
FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


def code_of(connection: socket.socket) -> int:
    """The code of the response; 0 if the connection ends without one."""
    data = b""
    try:
        while b"\r\n" not in data and (piece := connection.recv(4096)):
            data += piece
    except ConnectionError:
        pass
    finally:
        connection.close()
    return int(data.split()[1]) if data else 0


def head(length: str, path: str = "/caption") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\n{length}\r\n\r\n".encode()


def bomb(side: int) -> bytes:
    """A PNG of few bytes whose header says ``side`` x ``side`` pixels."""
    stream = io.BytesIO()
    Image.new("L", (side, 1)).save(stream, "PNG")
    data = stream.getvalue()
    header = b"IHDR" + side.to_bytes(4, "big") * 2 + data[24:29]
    return data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:]


def test_pictures_that_can_not_be_used(server: Served) -> None:
    for data, says in (
        (b"", "empty"),
        (b"GIF89a", "no picture"),
        (b"no picture at all", "no picture"),
        (picture(size=(200, 200), form="JPEG")[:-300], "ends too early"),
        (bomb(20_000), "too many pixels; at most 1,000,000 are taken"),
        (picture(size=(2000, 10)), "too narrow"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no picture"),
    ):
        code, body = server.send("POST", "/caption", data, PNG)
        assert code == 422 and says in json.loads(body)["detail"], (data[:20], body)
        assert server.post("/caption", data)[0] == 422


def test_bodies_that_are_not_well_formed(server: Served) -> None:
    whole = multipart(picture(), {"prompt": "x"})
    for body, headers, expected in (
        (picture(), {}, 415),
        (picture(), {"Content-Type": "text/html"}, 415),
        (whole, {"Content-Type": "multipart/form-data"}, 400),
        (whole[:40], FORM, 422),
        (b"\0" * 100, FORM, 400),
        (multipart(picture(), {"prompt": ["x"] * 100}), FORM, 400),
        (multipart(picture(), {"prompt": "x" * 100_000}), FORM, 400),
        (whole.replace(b'name="prompt"', b'name="image"; filename="y"'), FORM, 400),
    ):
        code, found = server.send("POST", "/caption", body, headers)
        assert code == expected and json.loads(found)["detail"], (body[:50], headers, code, found)


def test_requests_that_are_no_http(server: Served) -> None:
    for data in (b"\x16\x03\x01" + bytes(200), b"GET / HTTP/1.1\r\nA: " + b"x" * 100_000, head("Content-Length: -5")):
        assert code_of(server.raw(data)) == 400, data[:20]
    assert server.get("/health")[0] == 200


def test_an_announced_size_is_refused_before_it_comes(server: Served) -> None:
    assert code_of(server.raw(head("Content-Length: 1000000000000"))) == 413
    assert code_of(server.raw(head("Content-Length: 70000", "/search"))) == 413


def test_a_size_that_is_not_announced_is_refused_as_it_comes(server: Served) -> None:
    """Chunks without end; and what the server holds meanwhile stays far below what is sent."""
    before, sent = server.memory_bytes(), 0
    with server.raw(head("Transfer-Encoding: chunked")) as connection:
        piece = b"10000\r\n" + bytes(1 << 16) + b"\r\n"
        try:
            while sent < 1 << 28:
                connection.sendall(piece)
                sent += len(piece)
                if sent > 1 << 20:
                    connection.setblocking(False)
                    try:
                        answer = connection.recv(100)
                        break
                    except BlockingIOError:
                        connection.setblocking(True)
        except ConnectionError:
            answer = b"HTTP/1.1 413"
    assert b" 413" in answer and sent < 1 << 28
    assert server.memory_bytes() - before < 20e6


def test_many_uploads_at_once_take_bounded_memory(tmp_path: Path) -> None:
    """60 uploads that stay unfinished, of 4 MB each: 8 are read at a time, of the others what a connection holds."""
    count, size = 60, 4_000_000
    with served(tmp_path, "--max-bytes", str(size), "--queue", str(count)) as server, ExitStack() as open_ones:
        before = server.memory_bytes()
        uploads = [open_ones.enter_context(server.raw(head(f"Content-Length: {size}"))) for _ in range(count)]
        left = dict.fromkeys(uploads, size - 1)
        # those that are not read end where the system's buffers are full
        while ready := select.select([], [one for one in uploads if left[one]], [], 0.5)[1]:
            for one in ready:
                one.setblocking(False)
                left[one] -= one.send(bytes(min(left[one], 1 << 18)))
        assert list(left.values()).count(0) >= UPLOADS
        assert server.metric("openflm_requests_taken") == count
        assert server.memory_bytes() - before < UPLOADS * size * 2 + count * 500_000 < count * size / 2


@pytest.mark.slow
def test_drips_end_in_408_and_others_are_served_meanwhile(server: Served) -> None:
    slow = [server.raw(head("Content-Length: 1000")) for _ in range(4)]
    began = time.monotonic()
    while time.monotonic() - began < 2:
        for one in slow:
            one.sendall(b"x")
        assert server.post("/caption", picture())[0] == 200
        time.sleep(0.2)
    assert [code_of(one) for one in slow] == [408] * 4


def test_an_upload_that_ends_early_is_answered_or_dropped(server: Served) -> None:
    connection = server.raw(head("Content-Length: 1000") + b"x" * 10)
    connection.shutdown(socket.SHUT_WR)  # the client still listens
    assert code_of(connection) == 400
    server.raw(head("Content-Length: 1000") + b"x" * 10).close()
    assert server.post("/caption", picture())[0] == 200
    server.wait_for("openflm_requests_taken", 0)


def test_decoding_is_the_houses_and_large_pictures_are_shrunk() -> None:
    data = picture("green", (300, 200), "JPEG")
    with image_problems():
        expected = upright_rgb(open_image(data, 10**6, TRAINING_FORMATS))
    assert decode(data, 10**6).tobytes() == expected.tobytes()
    large = decode(picture("blue", (3000, 2000), "JPEG"), 10**7)
    assert 0.98 * KEPT_PIXELS < large.width * large.height < 1.02 * KEPT_PIXELS
    assert abs(large.width / large.height - 1.5) < 0.01 and large.getpixel((9, 9))[2] > 250


def test_a_turned_photograph_is_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (60, 40), "red")
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / os.fspath("turned.jpg"), exif=exif)
    assert decode((tmp_path / "turned.jpg").read_bytes(), 10**6).size == (40, 60)
