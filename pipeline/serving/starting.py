"""From a command line that was read to a server that runs."""

from __future__ import annotations

import argparse

from pipeline.batching.metrics import Metrics
from pipeline.batching.model import Model
from pipeline.batching.worker import Worker
from pipeline.config.options import ConfigError
from pipeline.serving.gate import Access, is_loopback
from pipeline.serving.picture_folder import PictureFolder
from pipeline.serving.running import Server, listen
from pipeline.serving.service import Service
from pipeline.serving.uploads import Limits

MIN_TOKEN = 16  # characters


def serve(options: argparse.Namespace, token: str | None) -> int:
    """Serve until a signal ends it. Raises ValueError for options that do not go together, and what can't be loaded."""
    local = is_loopback(options.host)
    token = checked_token(options.token or token or None, local, options)
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


def checked_token(token: str | None, local: bool, options: argparse.Namespace) -> str | None:
    """The token that requests must carry, None: none. Raises ConfigError if it is too short, or missing."""
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
