"""Kills the preparation of a split by SIGKILL at random moments, resumes it by other engines, and compares the result.

    python -m benchmarks.proof.kill_prepare [--kills 20] [--urls 3000] [--output FILE] [--folder DIR]

A server on this machine answers every request after a tenth of a second, some with 404. Attempts take turns: two local
processes, MPI with two workers (where mpirun is), an array of two tasks, one local process. All the time another
process looks at what is published: each part must be whole, by its hashes, and the split invisible until it is. At the
end its files must be those of a run that nobody disturbed, byte for byte. Exit codes: 0 equal, 1 a difference.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.cost.preparing import environment
from data_prep.__main__ import main as data_prep
from tests.data_prep.parts.image_server import REPOSITORY, arguments, files, image_server
from tests.data_prep.parts.killed_prepare import asked_more_than_once, prepare_with_kills

ROWS_PER_PART = 20
SECONDS = 0.1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--urls", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--longest", type=float, default=8.0, help="seconds an attempt has at most before its kill")
    parser.add_argument("--folder", type=Path, help="where to write (a temporary folder inside it)")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks" / "results" / "kill_prepare.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name, image_server() as server:
        folder = Path(name)
        server.status = {number: 404 for number in range(0, options.urls, 9)}
        table = server.table(folder / "rows.tsv", options.urls)
        if data_prep(arguments(table, folder / "whole", "--processes", "2", rows_per_part=ROWS_PER_PART)):
            return 1
        server.asked.clear()
        server.seconds = SECONDS
        (folder / "killed").mkdir()
        output = folder / "killed" / "whole"
        expected = files(folder / "whole" / "train")
        course = prepare_with_kills(
            *(table, output, options.kills, options.seed, options.longest, ROWS_PER_PART, expected)
        )
        equal = files(output / "train") == expected
        again = asked_more_than_once(server, options.urls)
    killed = Counter(engine for engine, was_killed, _ in course.attempts if was_killed)
    result = {
        "environment": environment(),
        "command": shlex.join(["python -m benchmarks.proof.kill_prepare", *sys.argv[1:]]).replace("'", ""),
        "equal": equal,
        "kills": dict(killed),
        "attempts": [list(one) for one in course.attempts],
        "looks at the parts": course.looks,
        "URLs asked more than once": again,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{'equal' if equal else 'DIFFERENT'} after {sum(killed.values())} kills: {dict(killed)}")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
