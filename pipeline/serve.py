"""Serves a trained model over HTTP, with a page to try it on: python -m pipeline.serve FOLDER

FOLDER is a run, one of its checkpoints, or an exported folder. Other machines are served only with a token, which their
requests carry as `Authorization: Bearer TOKEN`: --token, or better the environment variable OPENFLM_TOKEN, which other
users of this machine do not see. Endpoints and limits: docs/serve.md.

Exit codes: 0 ended by SIGTERM or Ctrl-C, 1 bug, 2 a wrong command line, or a folder that can't be loaded.
"""

from __future__ import annotations

import argparse
import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.program import run_program
from pipeline.config.options import ConfigError, fail
from pipeline.config.program_options import number, program_parser, whole_number

if TYPE_CHECKING:
    from pipeline.batching.model import Model

MIN_TOKEN = 16  # characters
PACKAGES = ("fastapi", "uvicorn", "python_multipart")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = parser().parse_args(argv)
    try:
        return serve(options, os.environ.get("OPENFLM_TOKEN"))
    except ValueError as error:
        return fail(error)


def serve(options: argparse.Namespace, token: str | None) -> int:
    """Serve until a signal ends it. Raises ValueError for options that do not go together, and what can't be loaded."""
    _need_packages()
    from pipeline.batching.metrics import Metrics
    from pipeline.batching.worker import Worker
    from pipeline.serving.gate import Access, is_loopback
    from pipeline.serving.picture_folder import PictureFolder
    from pipeline.serving.running import Server, listen
    from pipeline.serving.service import Service
    from pipeline.serving.uploads import Limits

    local = is_loopback(options.host)
    token = _checked(options.token or token or None, local, options)
    names = frozenset(options.public_name) if local or options.public_name else None
    if not options.folder.is_dir():
        raise ConfigError(f"{options.folder}: no such folder; give a run, a checkpoint of one, or an exported folder")
    limits = Limits(options.max_bytes, options.max_pixels, options.timeout, options.queue)
    folder = PictureFolder(options.search, limits) if options.search else None
    metrics = Metrics()
    worker = Worker(options.batch_size, options.batch_wait_ms / 1000, metrics)
    listening = listen(options.host, options.port)
    server = Server(Service(worker, limits, folder, metrics), Access(token, names, local), lambda: load(options))
    return server.run(listening)


def load(options: argparse.Namespace) -> Model:
    """The model of the command line."""
    from pipeline.using.model import load_model

    return load_model(options.folder, options.device, options.dtype)


def _need_packages() -> None:
    try:
        for name in PACKAGES:
            import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"serving needs {error.name}, which is not installed; install it with: pip install 'openflm[serve]'"
        ) from None


def _checked(token: str | None, local: bool, options: argparse.Namespace) -> str | None:
    if token is not None and (len(token) < MIN_TOKEN or not token.isascii() or not token.isprintable() or " " in token):
        raise ConfigError(
            f"found a token of {len(token)} characters; expected at least {MIN_TOKEN} of ASCII without blanks, as"
            " `openssl rand -hex 16` gives"
        )
    if token is None and (not local or options.public_name):
        where = f"--host {options.host}" if not local else "--public-name"
        raise ConfigError(
            f"{where} serves others than this machine and there is no token; set OPENFLM_TOKEN, or leave {where} out"
        )
    return token


def parser() -> argparse.ArgumentParser:
    parser = program_parser("pipeline.serve", __doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a run, a checkpoint of one, an exported folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; others than loopback need a token")
    parser.add_argument("--port", type=whole_number(0), default=8000, help="0: any free one (default 8000)")
    parser.add_argument("--token", help="what requests must carry; better set OPENFLM_TOKEN")
    parser.add_argument(
        "--public-name",
        action="append",
        default=[],
        metavar="NAME",
        help="a name under which a proxy publishes this server; needs a token",
    )
    parser.add_argument("--search", type=Path, metavar="DIR", help="a folder of pictures that can be searched")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="(default: bf16 on GPUs that have it)")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-bytes", type=whole_number(), default=20_000_000, help="of a picture (20,000,000)")
    limits.add_argument("--max-pixels", type=whole_number(), default=50_000_000, help="of a picture (50,000,000)")
    text = "for an upload, and as many again for its answer (30)"
    limits.add_argument("--timeout", type=number("seconds", most=3600), default=30.0, metavar="SECONDS", help=text)
    limits.add_argument("--queue", type=whole_number(), default=64, help="requests at once; more get 429 (64)")
    limits.add_argument("--batch-size", type=whole_number(), default=16, help="requests that are answered at once (16)")
    text = "that a request waits for others of its batch (5)"
    limits.add_argument("--batch-wait-ms", type=number("ms", zero=True), default=5.0, metavar="MS", help=text)
    return parser


if __name__ == "__main__":
    run_program(main)
