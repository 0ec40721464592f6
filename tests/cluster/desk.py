"""Where a user sits: a folder, settings of the site, and the commands that are typed there."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.slurm_cluster import Cluster

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = REPOSITORY / "slurm"
SITE = (SCRIPTS / "site.sh").read_text()


@dataclass
class Desk:
    """Commands are run for a cluster, files go to the folder."""

    cluster: Cluster
    folder: Path

    def site(self, name: str = "site.sh", **settings: str | list[str]) -> Path:
        """A copy of slurm/site.sh with other settings; returns its path."""
        words = lambda value: shlex.quote(value) if isinstance(value, str) else f"({shlex.join(value)})"  # noqa: E731
        defaults: dict[str, str | list[str]] = {
            "RUNS": str(self.folder / "runs"),
            "LOGS": str(self.folder / "logs"),
            "SCRATCH": str(self.folder),
            "HEALTH": "no",
        }
        lines = [f"{name}={words(value)}" for name, value in (defaults | settings).items()]
        path = self.folder / name
        path.write_text(SITE + "\n".join(lines) + "\n")
        return path

    def sbatch(self, script: str, *arguments: str | Path, site: Path, options: tuple[str, ...] = (), **env: str) -> str:
        """The number of the job that ``sbatch OPTIONS slurm/SCRIPT ARGUMENTS`` gives."""
        output = f"--output={self.folder}/%x-%j.out"
        command = ["sbatch", "--parsable", output, *options, SCRIPTS / script, *arguments]
        return self.cluster.run(*command, OPENFLM_SITE=str(site), **env).split()[-1].partition(";")[0]

    def wait(self, condition: Callable[[], bool], seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"nothing after {seconds} s"
            time.sleep(0.1)

    def log(self, number: str) -> str:
        """What a job has printed."""
        return Path(self.cluster.job(number)["StdOut"]).read_text()
