"""A process that makes parts until there are none left to make; it ends with the process that started it."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from data_prep.downloading.courtesy import Courtesy
from data_prep.downloading.fetch import FetchOptions
from data_prep.downloading.lean_imports import leave_out_unused
from data_prep.parts.claims import MOVING, Claims
from data_prep.parts.part import CLAIMED, PartOptions, make_part
from data_prep.parts.plan import Plan, open_plan
from data_prep.record import PrepError

_AGAIN_SECONDS = 1.0  # between looks at parts that somebody else has claimed


def main(argument: str) -> int:
    """Make parts; the exit code is 0, or 2 with a line on stderr."""
    leave_out_unused()
    task = json.loads(argument)
    try:
        work(
            open_plan(Path(task["folder"])),
            _options(task["options"]),
            task["first"],
            task["count"],
            task["leave"],
        )
    except (PrepError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _options(stored: dict[str, Any]) -> PartOptions:
    fetch = stored["fetch"]
    courtesy = Courtesy(**{**fetch["courtesy"], "disallow": tuple(fetch["courtesy"]["disallow"])})
    return PartOptions(**{**stored, "fetch": FetchOptions(**{**fetch, "courtesy": courtesy})})


def work(plan: Plan, options: PartOptions, first: int, count: int, leave: bool) -> None:
    """Make parts ``first``, ``first`` + ``count``, ... and then any other, until each is made or has failed.

    With ``leave`` it also ends when it has seen others work on all that are left.
    """
    claims = Claims(plan, options.stale_seconds)
    order = [*range(first, plan.parts, count), *(n for n in range(plan.parts) if n % count != first)]
    left = order
    while left:
        left = [number for number in left if not _is_settled(plan, number)]
        before = len(left)
        left = [number for number in left if _try(plan, number, options, claims) == CLAIMED]
        if left and len(left) == before:
            if leave and all(claims.state(number) == MOVING for number in left):
                return
            if not plan.folder.is_dir():  # another one has sealed the split
                return
            time.sleep(_AGAIN_SECONDS)


def _is_settled(plan: Plan, number: int) -> bool:
    return plan.is_done(number) or plan.failure(number).exists()


def _try(plan: Plan, number: int, options: PartOptions, claims: Claims) -> str:
    if _is_settled(plan, number):
        return "settled"
    try:
        return make_part(plan.folder, number, options, claims)
    except (PrepError, OSError):
        if plan.folder.is_dir():
            raise
        return CLAIMED  # another one has sealed the split and removed the plan


def end_with_parent() -> None:
    """End this process when its input is closed: the one that holds the other end is gone."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    end_with_parent()
    sys.exit(main(sys.argv[1]))
