"""A hub on this machine: a folder as the dataset ``user/data``, as far as huggingface_hub's file system asks.

Endpoints as of huggingface_hub's ``HfApi``: revision, tree, paths-info, resolve. Ranges and faults are RangeServer's.
"""

from __future__ import annotations

import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.range_server import Handler, RangeServer

NAME, COMMIT = "user/data", "0123456789abcdef0123456789abcdef01234567"


class _Hub(Handler):
    def do_GET(self) -> None:
        self._route(has_body=True)

    def do_HEAD(self) -> None:
        self._route(has_body=False)

    def do_POST(self) -> None:
        form = urllib.parse.parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self._json([found for path in form["paths"] if (found := self._entry(path)) is not None])

    def _route(self, has_body: bool) -> None:
        path = urllib.parse.unquote(self.path.partition("?")[0])
        prefix = f"/api/datasets/{NAME}"
        if path.startswith(f"{prefix}/tree/"):
            below = path.removeprefix(f"{prefix}/tree/").partition("/")[2]
            folder = self.server.folder / below
            found = [self._entry(str(one.relative_to(self.server.folder))) for one in sorted(folder.glob("*"))]
            self._json(found, 200 if folder.is_dir() else 404)
        elif path.startswith(prefix):
            self._json({"id": NAME, "sha": COMMIT, "siblings": [], "private": False, "tags": []})
        elif path.startswith(f"/datasets/{NAME}/resolve/"):
            self.path = "/" + path.removeprefix(f"/datasets/{NAME}/resolve/").partition("/")[2]
            self._answer(has_body)
        else:
            self._json({"error": "Repository not found"}, 404)

    def _entry(self, path: str) -> dict | None:
        file = self.server.folder / path
        if not file.exists():
            return None
        size = 0 if file.is_dir() else file.stat().st_size
        return {"type": "directory" if file.is_dir() else "file", "path": path, "size": size, "oid": "0" * 40}

    def _json(self, content: object, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})


@contextmanager
def serving_hub(folder: Path) -> Iterator[RangeServer]:
    with RangeServer(folder, _Hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
