"""Many requests at once: batches, refusals of a full queue, clients that go away."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.batching.metrics import Metrics
from pipeline.batching.questions import Answers, Captions
from pipeline.batching.worker import Ended, Stream, Worker
from tests.pipeline.serving.fake_model import FakeModel
from tests.pipeline.serving.serving import picture, served

IMAGE = {"Content-Type": "image/png"}


def test_requests_share_batches_and_each_gets_its_own_answer(tmp_path: Path) -> None:
    colours = ["red", "green", "blue", "white"] * 8
    with served(tmp_path, "--batch-size", "8", environment={"SECONDS_A_CALL": "0.2"}) as server:
        with ThreadPoolExecutor(len(colours)) as threads:
            answers = threads.map(lambda one: server.send("POST", "/caption", picture(one), IMAGE), colours)
            found = [json.loads(body)["caption"] for code, body in answers]
        assert found == [f"a {colour} thing on a quiet background" for colour in colours]
        batches = server.metric("openflm_batch_size_count")
        assert server.metric("openflm_batch_size_sum") == len(colours)
        assert batches <= len(colours) / 2  # 4 full ones, and what came before the others


def test_200_at_once_are_answered_or_told_to_come_again(tmp_path: Path) -> None:
    codes, waits = Counter(), set()
    with served(tmp_path, "--queue", "32", environment={"SECONDS_A_CALL": "0.1"}) as server:

        def ask(_: int) -> None:
            with server.open("POST", "/caption", picture(), IMAGE) as response:
                codes[response.status] += 1
                if response.status == 429:
                    waits.add(response.headers["Retry-After"])
                response.read()

        with ThreadPoolExecutor(200) as threads:
            list(threads.map(ask, range(200)))
        assert set(codes) == {200, 429} and codes.total() == 200 and codes[200] >= 32 and waits == {"1"}
        server.wait_for("openflm_requests_taken", 0)
        assert server.send("POST", "/caption", picture(), IMAGE)[0] == 200


def test_a_request_that_waits_too_long_is_told_so(tmp_path: Path) -> None:
    options = "--timeout 1 --batch-size 1".split()
    with served(tmp_path, *options, environment={"SECONDS_A_CALL": "0.8"}) as server, ThreadPoolExecutor(4) as threads:
        codes = Counter(threads.map(lambda _: server.send("POST", "/caption", picture(), IMAGE)[0], range(4)))
        assert codes[200] >= 1 and codes[503] >= 1 and set(codes) <= {200, 503, 504}


def test_who_went_away_is_not_answered(tmp_path: Path) -> None:
    options = "--batch-size 1".split()
    with served(tmp_path, *options, environment={"SECONDS_A_CALL": "2"}) as server:
        head = (
            f"POST /caption HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: {len(picture())}"
        )
        waiting = [server.raw(f"{head}\r\n\r\n".encode() + picture()) for _ in range(10)]
        server.wait_for("openflm_requests_taken", 10)
        for one in waiting:
            one.close()
        server.wait_for("openflm_requests_taken", 0)
        assert server.metric("openflm_batch_size_count") <= 2
        assert (
            server.metric('openflm_requests_total{path="/caption",code="499"}') >= 7
        )  # the others were answered already


def test_a_stream_does_not_hold_up_others(tmp_path: Path) -> None:
    with served(tmp_path, environment={"SECONDS_A_WORD": "0.3"}) as server:
        with server.open("POST", "/caption?stream=true", picture(), IMAGE) as stream:
            first = stream.read(len(b'data: {"caption": "a"}\n\n'))
            assert server.send("POST", "/answer?question=which", picture(), IMAGE)[0] == 200
            rest = stream.read()
        assert first == b'data: {"caption": "a"}\n\n' and rest.startswith(b'data: {"caption": "a red"}')
        assert rest.endswith(b'event: done\ndata: {"caption": "a red thing on a quiet background"}\n\n')


def test_a_stream_that_nobody_reads_ends(tmp_path: Path) -> None:
    with served(tmp_path, environment={"SECONDS_A_WORD": "0.2"}) as server:
        with server.open("POST", "/caption?stream=true", picture(), IMAGE) as stream:
            stream.read(10)
        server.wait_for("openflm_requests_taken", 0)
        server.wait_for("openflm_queue_length", 0)


class Recorded(FakeModel):
    """Keeps the sizes of the calls for captions, in which it waits for ``gate``."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.gate = threading.Event()

    def caption(self, images, *settings, **named):
        if len(images[0].getbands()) == 3 and images[0].size != (64, 64):  # not the grey one that it is tried with
            self.gate.wait(10)
            self.sizes.append(len(images))
        return super().caption(images, *settings, **named)


def started(model: FakeModel, batch_size: int = 4) -> Worker:
    worker, loaded = Worker(batch_size, 0.0, Metrics()), threading.Event()
    worker.start(lambda: model, lambda error: loaded.set())
    assert loaded.wait(10)
    return worker


def image() -> object:
    from PIL import Image

    return Image.new("RGB", (8, 8), "red")


def test_batches_hold_equal_settings_only_and_no_more_than_their_size() -> None:
    model = Recorded()
    worker = started(model)
    begun = worker.submit(Captions(), image())
    while not begun.running():
        time.sleep(0.001)
    prompts = ["", "see", "", "see", "", "", ""]
    asked = [worker.submit(Captions(prompt), image()) for prompt in prompts]
    dropped = worker.submit(Captions(), image())
    assert dropped.cancel() and worker.waiting() == 8
    model.gate.set()
    found = [one.result(10) for one in asked]
    assert found == [f"{prompt} a red thing on a quiet background".strip() for prompt in prompts]
    assert model.sizes == [
        1,
        4,
        2,
        1,
    ]  # the first; four without a prompt; two with it; the fifth, beside the dropped one
    assert worker.end(10)


def test_of_a_batch_only_the_request_at_fault_fails() -> None:
    worker = started(FakeModel())
    asked = [worker.submit(Answers(), (image(), question)) for question in ("a", "refuse", "b", "crash")]
    assert [one.result(10) for one in (asked[0], asked[2])] == [[("red", 0.75)]] * 2
    assert isinstance(asked[1].exception(10), ValueError) and isinstance(asked[3].exception(10), RuntimeError)
    assert worker.end(10)


def test_the_background_goes_on_while_requests_come() -> None:
    worker, steps, ended = started(FakeModel()), [], threading.Event()
    worker.set_background(
        Stream(lambda _: iter(range(3)), lambda one: ended.set() if isinstance(one, Ended) else steps.append(one))
    )
    until = time.monotonic() + 20
    while not ended.is_set():
        worker.submit(Captions(), image()).result(10)
        assert time.monotonic() < until
    assert steps == [0, 1, 2] and worker.end(10)


def test_a_model_that_can_not_be_loaded_says_why(tmp_path: Path) -> None:
    worker, errors = Worker(1, 0.0, Metrics()), []

    def load() -> FakeModel:
        raise ValueError("no such model")

    worker.start(load, errors.append)
    assert worker.end(10) and str(errors[0]) == "no such model"


@pytest.mark.parametrize("sizes", [[1, 2, 3, 100]])
def test_the_histogram_of_batches(sizes: list[int]) -> None:
    metrics = Metrics()
    for size in sizes:
        metrics.count_batch(size)
    lines = dict(line.rsplit(" ", 1) for line in metrics.text().splitlines() if not line.startswith("#"))
    found = {name: int(lines[f'openflm_batch_size_bucket{{le="{name}"}}']) for name in ("1", "2", "4", "64", "+Inf")}
    assert found == {"1": 1, "2": 2, "4": 3, "64": 3, "+Inf": 4}
    assert float(lines["openflm_batch_size_sum"]) == 106 and int(lines["openflm_batch_size_count"]) == 4
