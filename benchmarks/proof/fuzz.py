"""Feeds mutated files and responses to every reader of foreign bytes, and counts how each of them ends.

    python -m benchmarks.proof.fuzz [--inputs 500] [--seed 0] [--targets images,shards,..] [--json FILE]

Inputs are sound ones in which bits are flipped, lengths and numbers are replaced, ranges are cut out, doubled or taken
from elsewhere, and names are replaced by paths. The same seed gives the same inputs. A reader may accept an input or
refuse it by the error that it names in its docstring; any other exception, an input that takes longer than a minute, a
file that is written or opened outside the folder, and a process that is started are findings, printed with the seed of
the input. Exit codes: 0 none found, 1 some.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from benchmarks.proof.fuzz_targets import TARGETS, Target

HANG_SECONDS = 60
CANARY = b"do-not-open"  # a file beside the folder of an input
_WORDS = [
    b"../canary",
    b"/canary",
    b"\0",
    b"-1",
    b"99999999999999999999",
    b"1e999",
    b"NaN",
    b"null",
    b"[" * 3000,
    b"{}",
]
_WORDS += [
    b'"' + b"a" * 300 + b'"',
    "\ud800\u202e\U0001f600".encode("utf-8", "surrogatepass"),
    b"\r\n\r\n",
    b"%00",
    b"&a *a",
]
_VALUES = (None, True, 0, -1, 2**31, 2**63, 2**70, 1e300, float("nan"), "", "a" * 300, "../" + CANARY.decode(), "/etc")
_VALUES += ("00000.tar", "manifest.json", ".", "\0", "\ud800", [], {}, [[]], [1, 2], {"a": {"b": None}})
_NUMBERS = (0, 1, -1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)
_PROGRAMS = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.", "ctypes.dlopen")
_CHANGES = (
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "shutil.",
)


def mutated(content: bytes, other: bytes, generator: random.Random) -> bytes:
    """``content`` after one to four changes; of JSON every other time one value, so that it stays JSON."""
    if content[:1] in b"{[" and generator.random() < 0.5:
        try:
            return mutated_json(json.loads(content), generator)
        except ValueError:
            pass
    data = bytearray(content)
    for _ in range(generator.choice((1, 1, 1, 2, 4))):
        place = generator.randrange(len(data) + 1)
        length = min(generator.choice((1, 4, 30, 600, 5000)), len(data) - place)
        change = generator.randrange(8)
        if change == 0:
            for _ in range(generator.choice((1, 3, 20)) if data else 0):
                data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        elif change == 1:
            del data[place:]
        elif change == 2:
            del data[place : place + length]
        elif change == 3:  # a part twice, a member of an archive for example
            begin = generator.randrange(len(data) + 1)
            data[place:place] = data[begin : begin + length * generator.choice((1, 1, 20))]
        elif change == 4:
            begin = generator.randrange(len(other) + 1)
            data[place : place + length] = other[begin : begin + length]
        elif change == 5:
            width, order = generator.choice((1, 2, 4, 8)), generator.choice(("little", "big"))
            number = generator.choice(_NUMBERS) % 256**width
            data[place : place + width] = number.to_bytes(width, order)
        elif change == 6:
            numbers = list(re.finditer(rb"-?\d+", data))
            found = generator.choice(numbers) if numbers else None
            if found is not None:
                data[found.start() : found.end()] = generator.choice(
                    (b"0", b"-1", b"7", b"9" * 20, b"1e400", b"[]", b"null")
                )
        else:
            data[place : place + generator.choice((0, length))] = generator.choice(_WORDS)
    return bytes(data[: 4 * len(content) + 100_000])


def mutated_json(tree: object, generator: random.Random) -> bytes:
    """A JSON document with one to three of its values replaced, removed or doubled."""
    for _ in range(generator.choice((1, 1, 3))):
        places, left = [], [tree]
        while left:
            node = left.pop()
            for key, value in (
                node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
            ):
                places.append((node, key))
                left.append(value)
        if not places:
            break
        (node, key), (elsewhere, other) = generator.choice(places), generator.choice(places)
        change = generator.randrange(4)
        if change == 0:
            del node[key]
        elif change == 1 and isinstance(node, list):
            node.append(node[key])
        elif change == 2:
            node[key] = json.loads(json.dumps(elsewhere[other]))
        else:
            node[key] = generator.choice(_VALUES)
    return json.dumps(tree, indent=1).encode()


class Watch:
    """Notes what happens outside of a folder while an input is read: an audit hook, which cannot be removed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.events, self.active = os.path.realpath(folder), [], False
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple) -> None:
        if not self.active:
            return
        if event.startswith(_PROGRAMS):
            self.events.append(f"{event} {arguments[:1]}")
        elif event == "open" or event.startswith(_CHANGES):
            path = arguments[0]
            if isinstance(path, str | bytes | os.PathLike):
                real = os.path.realpath(os.fsdecode(path))
                writes = event != "open" or bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
                is_inside = real == self.folder or real.startswith(self.folder + os.sep)
                if not is_inside and (writes or CANARY.decode() in real) and real != os.devnull:
                    self.events.append(f"{event} {real}")


class Finding(Exception):
    """An input that a reader did not end with as it should."""


def run_one(target: Target, seed: int, folder: Path, watch: Watch) -> str:
    """How the reader ended with the input that ``seed`` makes: "accepted", or a reason to refuse; raises Finding."""
    generator = random.Random(f"{target.name} {seed}")
    files = target.sample(generator)
    name = generator.choice(target.mutable or sorted(files))
    other = files[generator.choice(sorted(files))]
    files = files | {name: mutated(files[name], other, generator)}
    if target.amend is not None and generator.random() < 0.5:
        files = target.amend(files, name)  # an attacker's hashes fit
    write(files, folder)
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
    watch.events, watch.active = [], True
    try:
        outcome = target.use(folder, files) or "accepted"
        outcome = outcome if isinstance(outcome, str) else reason_of(outcome)
    except target.refusals as error:
        outcome = reason_of(error)
    except BaseException as error:  # a panic of a Rust library is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        where = traceback.format_exc().strip().splitlines()[-8:]
        raise Finding(f"{type(error).__name__}: {error}\n  " + "\n  ".join(where)) from error
    finally:
        watch.active = False
        faulthandler.cancel_dump_traceback_later()
    if watch.events:
        raise Finding(f"outside of its folder: {watch.events[:3]}")
    return outcome


def warm_up(target: Target, folder: Path) -> None:
    """Read a sound sample: libraries make their caches at their first call."""
    files = target.sample(random.Random(0))
    write(files, folder)
    try:
        target.use(folder, files)
    except target.refusals:
        pass  # a server's 404 is a sound sample, too


def write(files: dict[str, bytes], folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def reason_of(error: BaseException) -> str:
    """A refusal in few words: names, numbers and quotations left out."""
    text = getattr(error, "reason", None) if isinstance(getattr(error, "reason", None), str) else str(error)
    text = re.sub(r"\S*/\S*|'[^']*'|\"[^\"]*\"|\([^)]*\)?|\[[^\]]*\]?|\d+", " ", text.splitlines()[0] if text else "")
    words = " ".join(re.findall(r"[A-Za-z#.-]{2,}", text)[:5]).strip(".- ")
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=500, help="in all, divided over the targets")
    parser.add_argument("--seed", type=int, default=0, help="of the first input of each target")
    parser.add_argument("--targets", default=",".join(TARGETS), help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="write the counts there too")
    options = parser.parse_args(argv)
    names = options.targets.split(",")
    if unknown := [name for name in names if name not in TARGETS]:
        parser.error(f"no target {unknown[0]}; there are {', '.join(TARGETS)}")
    counts: dict[str, Counter[str]] = {}
    findings, slowest = [], {}
    root = Path(tempfile.mkdtemp(prefix="fuzz"))
    (root / CANARY.decode()).write_text("must not be opened")
    try:
        watch = Watch(root / "inside")
        for position, name in enumerate(names):
            target = TARGETS[name]()
            warm_up(target, root / "inside")
            number = options.inputs // len(names) + (position < options.inputs % len(names))
            counts[name] = Counter()
            for seed in range(options.seed, options.seed + number):
                began = time.monotonic()
                try:
                    counts[name][run_one(target, seed, root / "inside", watch)] += 1
                except Finding as finding:
                    counts[name]["FINDING"] += 1
                    findings.append(f"{name} seed {seed}: {finding}")
                slowest[name] = max(slowest.get(name, 0.0), time.monotonic() - began)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print(table(counts, slowest))
    if options.json:
        content = {"counts": counts, "findings": len(findings), "slowest_seconds": slowest, "seed": options.seed}
        options.json.write_text(json.dumps(content, indent=1))
    print(f"{sum(counter.total() for counter in counts.values())} inputs, {len(findings)} findings")
    for finding in findings[:20]:
        print(finding, file=sys.stderr)
    return 1 if findings else 0


def table(counts: dict[str, Counter[str]], slowest: dict[str, float]) -> str:
    """A Markdown table: inputs, those accepted, the most frequent refusals, the slowest input."""
    lines = ["| reader | inputs | accepted | refused, by reason | slowest |", "|---|---|---|---|---|"]
    for name, counter in counts.items():
        refused = [(reason, count) for reason, count in counter.most_common() if reason != "accepted"]
        shown = "; ".join(f"{reason} {count}" for reason, count in refused[:6])
        more = (
            f"; {len(refused) - 6} other reasons {sum(count for _, count in refused[6:])}" if len(refused) > 6 else ""
        )
        seconds = f"{slowest.get(name, 0):.2f} s"
        lines.append(f"| {name} | {counter.total()} | {counter['accepted']} | {shown}{more} | {seconds} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
