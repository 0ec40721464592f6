"""The command line of the server, and what of it does not go together."""

from __future__ import annotations

import argparse
import os
from importlib import import_module
from pathlib import Path

from pipeline.config.options import ConfigError, fail
from pipeline.config.program_options import number, program_parser, whole_number

PACKAGES = ("fastapi", "uvicorn", "python_multipart")


def run(doc: str, argv: list[str] | None) -> int:
    """The program with the help ``doc``: serve until a signal ends it. Returns the exit code."""
    options = server_parser(doc).parse_args(argv)
    try:
        need_packages()
        from pipeline.serving.starting import serve  # which imports them

        return serve(options, os.environ.get("OPENFLM_TOKEN"))
    except ValueError as error:
        return fail(error)


def need_packages() -> None:
    """Raises ConfigError where a package of the extra is missing."""
    try:
        for name in PACKAGES:
            import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"serving needs {error.name}, which is not installed; install it with: pip install '.[serve]'"
        ) from None


def server_parser(doc: str) -> argparse.ArgumentParser:
    parser = program_parser("pipeline.serve", doc)
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
