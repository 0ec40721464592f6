"""What batching gives a server: captions per second at --batch-size 16 against 1, of many requests at once on loopback.

    python -m benchmarks.cost.serving RUN --output benchmarks/results/serving.json

Both servers run beside each other and are asked in turn, so that a ratio is of two rounds next to each other. A third,
with the default queue, must answer every request with 200 or 429.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.cost.loading import machine


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    images = [jpeg(number) for number in range(16)]
    sizes, ratios = (arguments.batch_size, 1), []
    with ExitStack() as stack:
        more = ["--queue", str(arguments.requests), "--timeout", "600"]
        start = lambda *options: stack.enter_context(server(arguments.run, *options))  # noqa: E731
        ports = {size: start("--batch-size", str(size), *more) for size in sizes}
        default = start("--timeout", "600")
        for port in (*ports.values(), default):
            asyncio.run(ask(port, images, 4))  # what only the first requests pay for
        rates: dict[int, list[float]] = {size: [] for size in sizes}
        for _ in range(arguments.rounds):
            for size in sizes:
                began = time.perf_counter()
                codes = asyncio.run(ask(ports[size], images, arguments.requests))
                rates[size].append(codes[200] / (time.perf_counter() - began))
                assert codes == {200: arguments.requests}, codes
        ratios = [batched / single for batched, single in zip(*rates.values(), strict=True)]
        codes = asyncio.run(ask(default, images, arguments.requests))
    result: dict[str, Any] = {
        "requests_at_once": arguments.requests,
        "captions_per_second": {f"batch_size_{size}": [round(rate, 2) for rate in rates[size]] for size in sizes},
        "ratio": round(statistics.median(ratios), 2),
        "codes_with_the_default_queue": dict(sorted(codes.items())),
        "command": "python -m benchmarks.cost.serving " + " ".join(argv if argv is not None else sys.argv[1:]),
        "machine": machine(),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.output:
        Path(arguments.output).write_text(text + "\n")
    return 0 if set(codes) <= {200, 429} else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost.serving", description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a run that captions")
    parser.add_argument("--requests", type=int, default=200, help="at once")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output")
    return parser.parse_args(argv)


def jpeg(number: int) -> bytes:
    """320 x 240 px of coarse noise."""
    pixels = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((320, 240), Image.Resampling.BICUBIC).save(stream, "JPEG")
    return stream.getvalue()


@contextmanager
def server(run: str, *options: str) -> Iterator[int]:
    """The port of a server that is ready."""
    command = [sys.executable, "-m", "pipeline.serve", run, "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        lines = (process.stdout.readline(), process.stdout.readline())
        yield int(re.search(r":(\d+)/", lines[1])[1])
    finally:
        process.terminate()
        process.wait()


async def ask(port: int, images: Sequence[bytes], count: int) -> Counter[int]:
    """How often each code came back of ``count`` requests at once."""

    async def one(number: int) -> int:
        image = images[number % len(images)]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = "POST /caption HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {len(image)}\r\n\r\n".encode() + image)
        answer = await reader.read()
        writer.close()
        return int(answer.split()[1])

    return Counter(await asyncio.gather(*(one(number) for number in range(count))))


if __name__ == "__main__":
    sys.exit(main())
