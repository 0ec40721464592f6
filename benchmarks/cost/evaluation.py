"""What a second rank brings to an evaluation: the program on one rank and on two, a core each, the same scorecard.

    python -m benchmarks.cost.evaluation --run RUN --output RESULT.json -- --split dev --samples 256

What follows `--` goes to `pipeline.evaluate` as it is. Each rank is held on a core of its own with the processes that
it starts, as ranks of a job have theirs: else one rank decodes images on the core that the other would have. Seconds
are those of the scorecard: from the first batch to the last score, without starting Python and loading the model. One
and two ranks alternate; a ratio is of two runs of one round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cost.loading import machine
from pipeline.distributed.launching import reserve_port

OF_TIME_AND_PLACE = ("seconds", "items_done_before", "world_size", "time", "command")


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    arguments, passed = parse(words[:end]), words[end + 1 :]
    rounds, cards = [], []
    for _ in range(arguments.rounds):
        one, two = (evaluate(world, arguments.run, passed) for world in (1, 2))
        rounds.append({"one_seconds": one["seconds"], "two_seconds": two["seconds"]})
        cards += [one, two]
        print(json.dumps(rounds[-1] | {"ratio": one["seconds"] / two["seconds"]}), file=sys.stderr, flush=True)
    result = {
        "ratio": statistics.median(one["one_seconds"] / one["two_seconds"] for one in rounds),
        "rounds": rounds,
        "same_scorecard": all(timeless(card) == timeless(cards[0]) for card in cards),
        "items": cards[0]["items"],
        "task": cards[0]["task"],
        "decoding": cards[0]["decoding"],
        "versions": cards[0]["versions"],
        "command": " ".join(["python -m benchmarks.cost.evaluation", *words]).replace(str(arguments.run), "RUN"),
        "machine": machine(),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    return 0 if result["same_scorecard"] else 1


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost.evaluation", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="a run; real size, or ranks wait for small things")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path)
    return parser.parse_args(argv)


def evaluate(world: int, run: Path, words: Sequence[str]) -> dict[str, Any]:
    """The scorecard of an evaluation on so many ranks, one thread each, started from nothing."""
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as output:
        listening, variables = reserve_port()
        command = [sys.executable, "-m", "pipeline.evaluate", "--run", str(run), "--output", output, *words]
        ranks = []
        for rank in range(world):
            place = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
            environment = os.environ | variables | place | {"OMP_NUM_THREADS": "1"}
            descriptors = () if rank else (listening.fileno(),)
            held = ["taskset", "--cpu-list", str(cores[rank]), *command]
            ranks.append(subprocess.Popen(held, env=environment, pass_fds=descriptors, stdout=subprocess.DEVNULL))
        listening.close()
        if any([rank.wait() for rank in ranks]):
            raise SystemExit("an evaluation failed; its message stands above")
        (card,) = Path(output).glob("*/scorecard.json")
        return json.loads(card.read_text(encoding="utf-8"))


def timeless(card: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in card.items() if name not in OF_TIME_AND_PLACE}


if __name__ == "__main__":
    sys.exit(main())
