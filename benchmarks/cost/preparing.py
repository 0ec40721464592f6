"""Measures how fast a list of URLs becomes a split, against plain img2dataset on the same list and server.

    python -m benchmarks.cost.preparing [--urls 4000] [--repeats 3] [--latency 0.15] [--images DIR] [--output FILE]

A server in a process of its own answers from memory, at once or after --latency seconds, as servers of the world do:
then two workers don't wait for cores that they share with the server. In each round every way prepares the same list
once, one after another; ratios are of one round. "seconds" are those of the whole command, imports and all; "CPU
seconds" those of its processes, which other work on the machine changes less. Ways:

* img2dataset: its own defaults (images of 256 pixels, padded and encoded again), shards of 1,000;
* img2dataset, bytes kept: `--disable_all_reencoding`, which judges nothing;
* parts: `data_prep urls`, each image decoded whole, hashed, indexed;
* parts, MPI 1 and 2: the same by `--engine mpi` with one worker and with two.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import shutil
import socketserver
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from tests.data_prep.parts.image_server import REPOSITORY, mpirun

SIZE, DISTINCT = (320, 240), 64
HOSTS = [f"127.0.0.{number}" for number in range(1, 17)]  # a list names many, and each is spared; all are this machine
THREADS = 32
RESULTS = REPOSITORY / "benchmarks" / "results" / "preparing.json"


def main() -> int:
    arguments = parse_arguments()
    if arguments.serve is not None:
        return serve(arguments.serve, arguments.latency)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        write_images(folder / "images", arguments.images)
        command = [sys.executable, "-m", "benchmarks.cost.preparing", "--serve", str(folder / "images")]
        command += ["--latency", str(arguments.latency)]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
        try:
            table = write_table(folder / "rows.parquet", int(server.stdout.readline()), arguments.urls)
            rounds = [measure(table, folder, arguments) for _ in range(arguments.repeats)]
        finally:
            server.kill()
            server.wait()
    result = {
        "environment": environment(),
        "command": f"python -m benchmarks.cost.preparing {shlex.join(sys.argv[1:])}",
        "urls": arguments.urls,
        "rounds": rounds,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(table_of(rounds, arguments.urls))
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--urls", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before the server answers")
    parser.add_argument("--processes", type=int, default=2, help="of img2dataset and of parts")
    parser.add_argument("--ways", nargs="+", help="some of the ways only")
    parser.add_argument("--images", type=Path, help="a folder of JPEG files (default: drawn ones)")
    parser.add_argument("--folder", type=Path, help="where to write (a temporary folder inside it)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_images(folder: Path, source: Path | None) -> None:
    """JPEG files of smooth noise, about 20 KB each, or the first of a folder."""
    folder.mkdir()
    if source is not None:
        for number, path in enumerate(sorted(source.glob("*.jpg"))[: 16 * DISTINCT]):
            shutil.copyfile(path, folder / f"{number}.jpg")
        return
    random = np.random.default_rng(0)
    for number in range(DISTINCT):
        coarse = Image.fromarray(random.integers(0, 256, (40, 60, 3), dtype=np.uint8))
        coarse.resize(SIZE, Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=92)


def serve(folder: Path, latency: float) -> int:
    """Answer every GET /N after ``latency`` seconds with image N modulo their number; prints the port."""
    paths = sorted(folder.glob("*.jpg"), key=lambda path: int(path.stem))
    bodies = [path.read_bytes() for path in paths]
    answers = [
        b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(b) + b for b in bodies
    ]

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            line = self.request.recv(65536).partition(b"\r\n")[0]
            time.sleep(latency)
            self.request.sendall(answers[int(line.split()[1][1:]) % len(answers)])

    class Server(socketserver.ThreadingTCPServer):
        request_queue_size, daemon_threads, allow_reuse_address = 256, True, True

    servers = [Server((HOSTS[0], 0), Handler)]
    port = servers[0].server_address[1]
    servers += [Server((host, port), Handler) for host in HOSTS[1:]]
    threads = [threading.Thread(target=server.serve_forever) for server in servers]
    for thread in threads:
        thread.start()
    print(port, flush=True)
    for thread in threads:
        thread.join()
    return 0


def write_table(path: Path, port: int, urls: int) -> Path:
    rows = {
        "url": [f"http://{HOSTS[n % len(HOSTS)]}:{port}/{n}" for n in range(urls)],
        "caption": [f"picture {n}" for n in range(urls)],
    }
    pyarrow.parquet.write_table(pyarrow.table(rows), path)
    return path


def measure(table: Path, folder: Path, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Every way once."""
    found = {}
    for name, command in commands(table, folder / "output", arguments).items():
        if arguments.ways and name not in arguments.ways:
            continue
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        log = folder / "log"
        with log.open("wb") as stream:
            done = subprocess.run(
                command, stdout=stream, stderr=stream, env=plain_environment(), cwd=folder, timeout=1800
            )
        if done.returncode:
            raise SystemExit(f"{name} ended with {done.returncode}: {log.read_text()[-2000:]}")
        seconds, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        images = sum(count_images(path) for path in (folder / "output").rglob("*.tar"))
        if images != arguments.urls:
            raise SystemExit(f"{name}: {images} images of {arguments.urls}")
        found[name] = {"seconds": round(seconds, 2), "CPU seconds": round(cpu, 2)}
        print(name, found[name], file=sys.stderr)
        shutil.rmtree(folder / "output")
    return found


def commands(table: Path, output: Path, arguments: argparse.Namespace) -> dict[str, list[str]]:
    rows_per_part = str(-(-arguments.urls // 4))  # the same units of work for all
    theirs = [sys.executable, "-c", "from img2dataset import main; main()", "--url_list", str(table)]
    theirs += ["--input_format", "parquet", "--url_col", "url", "--caption_col", "caption"]
    theirs += ["--output_format", "webdataset", "--output_folder", str(output), "--thread_count", str(THREADS)]
    theirs += ["--processes_count", str(arguments.processes), "--number_sample_per_shard", rows_per_part]
    ours = [sys.executable, "-m", "data_prep", "urls", "--input", str(table), "--output", str(output)]
    ours += ["--threads", str(THREADS), "--rows-per-part", rows_per_part, "--allow-private-addresses"]
    ways = {
        "img2dataset": theirs,
        "img2dataset, bytes kept": [*theirs, "--disable_all_reencoding", "True"],
        "parts": [*ours, "--processes", str(arguments.processes)],
    }
    if mpirun(1):
        ways |= {f"parts, MPI {n}": [*mpirun(n + 1), *ours, "--engine", "mpi"] for n in (1, 2)}
    return ways


def count_images(tar: Path) -> int:
    import tarfile

    with tarfile.open(tar) as members:
        return sum(name.endswith(".jpg") for name in members.getnames())


def plain_environment() -> dict[str, str]:
    more = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "NO_ALBUMENTATIONS_UPDATE": "1"}
    return {**os.environ, **more}


def environment() -> dict[str, str | int]:
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    packages = {name: version(name) for name in ("img2dataset", "pillow", "mpi4py")}
    load = f"{os.getloadavg()[0]:.1f}"
    return {"CPU": model.partition(": ")[2], "cores": os.cpu_count() or 0, "load at the end": load, **packages}


def table_of(rounds: list[dict], urls: int) -> str:
    """Medians over the rounds; ratios to the first way, of the same round."""
    lines = ["| way | URLs/s | ratio | CPU ms per URL | ratio |", "|---|---|---|---|---|"]
    first = next(iter(rounds[0]))
    for way in rounds[0]:
        seconds, cpu = ([one[way][what] for one in rounds] for what in ("seconds", "CPU seconds"))
        faster = [one[first]["seconds"] / one[way]["seconds"] for one in rounds]
        dearer = [one[way]["CPU seconds"] / one[first]["CPU seconds"] for one in rounds]
        cells = [f"{urls / statistics.median(seconds):.0f}", spread(faster)]
        cells += [f"{1000 * statistics.median(cpu) / urls:.2f}", spread(dearer)]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}, {max(values):.2f})"


if __name__ == "__main__":
    sys.exit(main())
