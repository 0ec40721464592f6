"""Files of the Hugging Face hub: those in the local cache, else fetched within a time limit.

Fetching happens in a process of its own, which can be given up whatever it waits for: a name server, a connection, a
library's retries.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

CONNECT_SECONDS = 15  # for the hub to answer at all: what a machine without a network waits at most, once
FETCH_SECONDS = 1200  # for all that it is asked for; other ranks wait for 30 minutes at most


class HubError(Exception):
    """Why files can't be had, in words that end a sentence."""


class Hub:
    """The hub as this process sees it; one that did not answer is not asked again."""

    def __init__(self, connect_seconds: float = CONNECT_SECONDS, fetch_seconds: float = FETCH_SECONDS) -> None:
        self._connect_seconds, self._seconds_left = connect_seconds, fetch_seconds
        self._silence: str | None = None

    def folder(self, repository: str, *names: str) -> Path:
        """A folder of the local cache that holds the named files of ``repository``, all of one revision.

        Raises:
            HubError: they are not there and can't be fetched.
        """
        folder = _cached(repository, names)
        if folder is not None:
            return folder
        from huggingface_hub.constants import is_offline_mode

        if is_offline_mode():
            raise HubError("not in the local cache, and HF_HUB_OFFLINE forbids to ask the hub")
        if self._silence is None:
            self._silence = self._ask("reach", self._connect_seconds, repository, names).get("error", "")
        if self._silence:
            raise HubError(f"not in the local cache, and the hub does not answer ({self._silence})")
        minutes = self._seconds_left / 60
        print(
            f"fetching {', '.join(names)} of {repository} from the hub (for {minutes:.0f} minutes at most)", flush=True
        )
        start = time.monotonic()
        answer = self._ask("fetch", self._seconds_left, repository, names)
        self._seconds_left = max(0.0, self._seconds_left - (time.monotonic() - start))
        if "error" in answer:
            raise HubError(f"not in the local cache, and the hub does not give it ({answer['error']})")
        return Path(answer["folder"])

    def _ask(self, what: str, seconds: float, repository: str, names: tuple[str, ...]) -> dict[str, str]:
        """The answer of ``main`` in a process of its own, killed after ``seconds``."""
        environment = dict(os.environ)
        if not sys.stderr.isatty():
            environment["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        try:
            done = subprocess.run(
                [sys.executable, __file__, what, repository, *names],
                stdout=subprocess.PIPE,
                stdin=subprocess.DEVNULL,
                env=environment,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"nothing within {seconds:g} s"}
        lines = done.stdout.decode().splitlines()
        return json.loads(lines[-1]) if lines else {"error": f"its process ended with code {done.returncode}"}


def _cached(repository: str, names: tuple[str, ...]) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    paths = [try_to_load_from_cache(repository, name) for name in names]
    return Path(paths[0]).parent if all(isinstance(path, str) for path in paths) else None


def main(what: str, repository: str, *names: str) -> dict[str, str]:
    """Ask the hub: ``reach`` whether it answers, ``fetch`` for files. Returns {"folder"}, {"error"} or nothing."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        if what == "reach":
            get_hf_file_metadata(hf_hub_url(repository, names[0]))
            return {}
        return {"folder": str(Path([hf_hub_download(repository, name) for name in names][-1]).parent)}
    except HfHubHTTPError as error:
        return {} if what == "reach" else {"error": _first_line(error)}  # an answer, though no welcome one
    except Exception as error:  # many libraries speak below; all mean that the hub can't be used
        return {"error": _first_line(error)}


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


if __name__ == "__main__":
    sys.path.pop(0)  # run by path: not pipeline/, whose names shadow others
    print(json.dumps(main(*sys.argv[1:])))
