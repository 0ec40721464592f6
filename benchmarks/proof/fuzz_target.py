"""What a target of the fuzz is."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Files = dict[str, bytes]  # content by path below the folder of an input


@dataclass(frozen=True)
class Target:
    """``sample`` gives sound files of which one of ``mutable`` (default: any) is changed and then maybe its hashes
    amended; ``use`` reads them, and returns a reason where the reader counts refusals instead of raising one of
    ``refusals``."""

    name: str
    sample: Callable[[random.Random], Files]
    use: Callable[[Path, Files], str | Exception | None]
    refusals: tuple[type[BaseException], ...]
    mutable: tuple[str, ...] = ()
    amend: Callable[[Files, str], Files] | None = None
