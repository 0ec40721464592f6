"""The demo: draws images, serves and downloads them, prepares shards, trains, captions held-out images, reports.

Run by `make demo`. Every stage prints the command that does it, so that each can be typed by hand; a stage whose result
is already there is skipped, an interrupted training continues. Needs no network beyond 127.0.0.1.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from data_prep.parallel import default_workers  # noqa: E402
from pipeline.distributed.launching import launched_ranks  # noqa: E402
from pipeline.recording.run_log import LOG_NAME, read_log  # noqa: E402
from pipeline.reporting.formats import number as as_text  # noqa: E402
from pipeline.reporting.page import held_out_rows  # noqa: E402

PYTHON = "python"  # in printed commands; they are run by the interpreter of this file


class StageFailed(Exception):
    """A command of a stage ended with an error, whose message it has printed itself."""

    def __init__(self, command: list[str], code: int) -> None:
        super().__init__(f"`{shlex.join(command)}` ended with exit code {code}")
        self.code = code


class Demo:
    """The folders of the demo, and the time of each stage."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.web: Path = options.work / "web"
        self.data: Path = options.work / "data"
        self.corpus: Path = self.data / "shapes"
        self.tokenizer: Path = self.data / "tokenizer"
        self.run_folder: Path = options.output
        self.options = options
        self.times: list[tuple[str, float]] = []

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """Prints the title, and the time of the block it wraps."""
        print(f"\n== {title}", flush=True)
        began = time.monotonic()
        yield
        self.times.append((title, time.monotonic() - began))
        print(f"   {self.times[-1][1]:.1f} s", flush=True)

    def command(self, *words: object, environment: Mapping[str, str] | None = None) -> None:
        """Shows and runs a command in the repository root; raises StageFailed with its exit code."""
        shown = [str(word) for word in words]
        print(f"$ {shlex.join(shown)}", flush=True)
        actual = [sys.executable, *shown[1:]] if shown[0] == PYTHON else shown
        # In a session of its own, so that Ctrl-C reaches this program alone and training can save before it ends.
        process = subprocess.Popen(actual, cwd=ROOT, env={**os.environ, **(environment or {})}, start_new_session=True)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            _end(process)
            raise
        if code:
            raise StageFailed(shown, code if code > 0 else 128 - code)


def main() -> int:
    """Runs all stages; returns the exit code."""
    return run(Demo(_parse()), lambda demo: (prepare(demo), train(demo), caption(demo), write_report(demo)))


def run(demo: Demo, stages: Callable[[Demo], object]) -> int:
    """Runs the stages of a demo and prints what came out; returns the exit code."""
    if demo.options.fresh:
        remove_results(demo.options)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    began = time.monotonic()
    try:
        stages(demo)
    except StageFailed as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    summarise(demo, time.monotonic() - began)
    return 0


def remove_results(options: argparse.Namespace) -> None:
    """What earlier demos have left."""
    for folder in (options.work, options.output):
        shutil.rmtree(folder, ignore_errors=True)


def prepare(demo: Demo) -> None:
    """Images over HTTP to shards, tokenizer, verification."""
    splits = [split for split in ("train", "dev") if not (demo.corpus / split / "manifest.json").is_file()]
    if splits:
        with _served(demo.web) as url:
            with demo.stage("draw scenes, write images and tables of URLs"):
                demo.command(
                    *(PYTHON, "-m", "data_prep", "synth", "--urls", demo.web, "--base-url", url),
                    *("--train", demo.options.train, "--dev", demo.options.dev, "--test", 0),
                )
            with demo.stage("download them with img2dataset into shards"):
                port = url.rsplit(":", 1)[1]
                print(f"$ python -m http.server {port} --bind 127.0.0.1 --directory {demo.web} &   (runs in here)")
                for split in splits:
                    demo.command(
                        *(PYTHON, "-m", "data_prep", "urls", "--input", demo.web / f"{split}.tsv"),
                        *("--output", demo.corpus, "--split", split, "--extra-columns", "main_colour,main_shape"),
                        "--allow-private-addresses",  # the server is this machine
                        "--restart",  # the port, and with it every URL, is another one each time
                    )
    if not (demo.tokenizer / "tokenizer.json").is_file():
        with demo.stage("train a tokenizer on the captions"):
            demo.command(PYTHON, "-m", "data_prep", "tokenizer", "--data", demo.corpus, "--output", demo.tokenizer)
    with demo.stage("verify the shards"):
        demo.command(PYTHON, "-m", "data_prep", "verify", demo.corpus)
        demo.command(PYTHON, "-m", "data_prep", "info", demo.corpus)


def train(demo: Demo) -> None:
    """Pretraining under the real launcher, ZeRO-2."""
    launch_training(demo, "pretrain", 2, "--recipe", "demo", "--data", demo.data)


def launch_training(demo: Demo, what: str, stage: int, *words: object) -> None:
    """A training with DeepSpeed's launcher at a stage of ZeRO, on all GPUs or on two CPU ranks."""
    ranks = _num_gpus() or 2
    threads = max(1, default_workers() // ranks)
    with demo.stage(f"{what} with DeepSpeed, ZeRO-{stage}, {ranks} rank{'s' if ranks > 1 else ''}"):
        demo.command(
            *("deepspeed", "--log_level", "warning", "--num_gpus", ranks),
            *("pipeline/train.py", "--deepspeed", f"ds_configs/zero{stage}.json", *words),
            *("--output", demo.run_folder),
            *(("--train.steps", demo.options.steps) if demo.options.steps else ()),
            environment={"OMP_NUM_THREADS": str(threads)},
        )


def caption(demo: Demo) -> None:
    """Captions of held-out scenes: all of them scored, a few files as a user would caption them."""
    with demo.stage("caption held-out scenes"):
        demo.command(
            *(PYTHON, "-m", "pipeline.generate", "--run", demo.run_folder),
            *("--data", demo.data, "--split", "dev", "--samples", demo.options.dev),
        )
        files = sorted((demo.web / "images" / "dev").glob("*.jpg"))[:3]
        if files:
            demo.command(PYTHON, "-m", "pipeline.generate", "--run", demo.run_folder, *files)


def write_report(demo: Demo) -> None:
    """The page with curves and captions."""
    with demo.stage("write the report"):
        demo.command(PYTHON, "-m", "pipeline.report", "--run", demo.run_folder)


def summarise(demo: Demo, seconds: float) -> None:
    """The closing table."""
    records = [record for record in read_log(demo.run_folder / LOG_NAME) if record["kind"] == "eval"]
    head = ["held-out", "before", "after", "shuffled images"]
    table = [
        head,
        *([r.name.replace("_", " "), *map(as_text, (r.first, r.last, r.shuffled))] for r in held_out_rows(records)),
    ]
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]
    print("\n== result")
    for row in table:
        print(
            "   " + row[0].ljust(widths[0]) + "".join(f"  {c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))
        )
    samples = json.loads((demo.run_folder / "samples.json").read_text(encoding="utf-8"))
    for name, value in samples["summary"].items():
        print(f"   {name.replace('_', ' ')}: {f'{100 * value:.1f} %' if isinstance(value, float) else value}")
    spent = ", ".join(f"{title.split(',')[0]} {taken:.0f} s" for title, taken in demo.times)
    print(f"   time: {seconds:.0f} s ({spent})")
    print(f"   run:    {demo.run_folder}\n   report: {demo.run_folder / 'report.html'}")


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    """Serves a folder on a free port of 127.0.0.1; gives the base URL."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    folder.mkdir(parents=True, exist_ok=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _end(process: subprocess.Popen, patience_seconds: float = 60.0) -> None:
    """Asks a command to end, then ends it with everything it started."""
    print("\nstopping; press Ctrl-C again to end at once", file=sys.stderr, flush=True)
    for pid in launched_ranks(process.pid) or [process.pid]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
        process.wait(patience_seconds)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _num_gpus() -> int:
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines()) if listed.returncode == 0 else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make demo ARGS=...", description="The whole system on an embedded corpus.")
    parser.add_argument("--fresh", action="store_true", help="remove the results of earlier demos first")
    parser.add_argument("--train", type=int, default=16000, help="training scenes (default: 16000)")
    parser.add_argument("--dev", type=int, default=500, help="held-out scenes (default: 500)")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: as the recipe says)")
    parser.add_argument("--work", type=Path, default=Path("demo_run"), help="images and shards (default: demo_run)")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="run folder (default: runs/demo)")
    return parser.parse_args()


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
