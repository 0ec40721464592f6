"""Photographs downloaded from a server that misbehaves: every URL has the outcome that is expected of it.

    python -m benchmarks.proof.misbehaving_downloads --images FOLDER [--slow 8] [--output FILE.json]

A folder of JPEGs is served from this machine, each picture with one behaviour of
``tests/data_prep/downloading/misbehaving_server.py``, to ``python -m data_prep urls``. Most are served as they
are. Then the server recovers, and what failed for a reason that can change is asked for again: nothing else may be.
Needs Linux, which has all of 127.0.0.0/8 for hosts. Exit code 1 where an outcome, a picture or a number of requests
differs from what is expected.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from benchmarks.cost.loading import machine
from data_prep.downloading.failures import can_change
from tests.data_prep.downloading.misbehaving_server import (
    BEHAVIOURS,
    FAST,
    SLOW,
    WRITTEN,
    MisbehavingServer,
    misbehaving,
)

OF_THE_HOST = {"timeout", "connection_failed", "http_429", "http_503"}  # five in a row, and a host is left alone
URLS_OF_A_HOST, TRYING_HOSTS, DEAD_URLS = 2, 500, 40
ENOUGH = 40  # URLs of each behaviour that a host is left alone for
DEAD, COPY = "silent, all of one host", "ok, under a second URL"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of JPEGs")
    parser.add_argument(
        "--slow", type=int, default=8, help="URLs of each behaviour that goes on until the client ends it"
    )
    parser.add_argument("--timeout", type=int, default=15, help="of the downloader, seconds for a read")
    parser.add_argument("--output", type=Path, help="write the counts as JSON here")
    arguments = parser.parse_args(argv)
    names = sorted(path.name for path in arguments.images.iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))
    if len(names) < 500:
        parser.error(f"{len(names)} JPEGs in {arguments.images}, expected 500 at least")
    read = lambda name: (arguments.images / name).read_bytes()  # noqa: E731
    began = time.monotonic()
    with misbehaving(read, TRYING_HOSTS) as server, tempfile.TemporaryDirectory() as folder:
        plan = planned(server, names, arguments.slow)
        rows, wrong = first_run(server, Path(folder), plan, read, arguments.timeout)
        private, more = private_run(server, Path(folder), names[:50], read)
        again, yet_more = second_run(server, Path(folder), plan, rows, read, arguments.timeout)
    table = [*tabulated(plan, rows), private]
    print_table(table)
    print(f"second run: {again}")
    problems = [*wrong, *more, *yet_more]
    for problem in problems:
        print(f"DIFFERS {problem}")
    if arguments.output:
        written = {
            "command": "python -m benchmarks.proof.misbehaving_downloads --images FOLDER"
            f" --slow {arguments.slow} --timeout {arguments.timeout}",
            "img2dataset": version("img2dataset"),
            "machine": machine(),
            "seconds": round(time.monotonic() - began),
            "images": len(names),
            "table": table,
            "second_run": again,
            "differences": len(problems),
        }
        arguments.output.write_text(json.dumps(written, indent=1) + "\n")
    return 1 if problems else 0


def planned(server: MisbehavingServer, names: list[str], slow: int) -> dict[str, str]:
    """URL -> behaviour, in the order of the table."""
    draw = random.Random(0)
    order = draw.sample(names, len(names))
    plan: dict[str, str] = {}
    hosts = 8  # the first of them are those of behaviours that are no host's fault
    for behaviour in [*SLOW, *FAST]:
        spares = BEHAVIOURS[behaviour].outcome in OF_THE_HOST or behaviour.endswith("-once") or behaviour in SLOW
        count = slow if behaviour in SLOW else ENOUGH if spares else len(names) // (2 * len(FAST))
        for number in range(0 if behaviour == "ok" else count):
            host = hosts + number // URLS_OF_A_HOST if spares else number % 8
            assert host < TRYING_HOSTS, "more hosts than there are"
            plan[server.url(behaviour, order.pop(), host)] = behaviour
        hosts += -(-count // URLS_OF_A_HOST) if spares else 0
    plan |= {server.url("silent", order.pop(), hosts): DEAD for _ in range(DEAD_URLS)}
    plan |= {server.url("ok", name, number % 8): "ok" for number, name in enumerate(order)}
    plan |= {server.url("ok", name, number % 8) + "?copy": COPY for number, name in enumerate(order[:ENOUGH])}
    urls = list(plan)
    draw.shuffle(urls)
    return {url: plan[url] for url in urls}


def expected_of(behaviour: str) -> set[str]:
    """The outcomes that a URL may have."""
    if behaviour == DEAD:
        return {"timeout", "host_unavailable"}
    return {WRITTEN if behaviour == COPY else BEHAVIOURS[behaviour].outcome}


def prepare(folder: Path, name: str, urls: list[str], *more: str, **environment: str) -> tuple[dict[str, str], dict]:
    """Outcome by URL of the command, and the written pictures by URL."""
    table, corpus = folder / f"{name}.parquet", folder / name
    if not table.exists():
        captions = [f"of {n}" for n in range(len(urls))]
        pyarrow.parquet.write_table(pyarrow.table({"url": urls, "caption": captions}), table)
    command = [
        sys.executable,
        "-m",
        "data_prep",
        "urls",
        "--input",
        str(table),
        "--output",
        str(corpus),
        "--processes",
        "2",
    ]
    no_proxy = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    subprocess.run([*command, *more], check=True, stdout=subprocess.DEVNULL, env=no_proxy | environment)
    outcomes: dict[str, str] = {}
    for line in (corpus / "train" / "rejected.jsonl").read_text().splitlines():
        rejection = json.loads(line)
        if found := re.search(r"\d+", rejection["name"]):
            outcomes[urls[int(found.group())]] = rejection["reason"]
    written: dict[str, bytes] = {}
    for shard in sorted((corpus / "train").glob("*.tar")):
        with tarfile.open(shard) as tar:
            contents = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for member, content in contents.items():
            if member.endswith(".json"):
                written[json.loads(content)["url"]] = contents[member.removesuffix("json") + "jpg"]
    return outcomes | dict.fromkeys(written, WRITTEN), written


def first_run(
    server: MisbehavingServer, folder: Path, plan: dict[str, str], read: Any, timeout: int
) -> tuple[dict, list]:
    outcomes, written = prepare(folder, "first", list(plan), *options_of(timeout))
    wrong = differences(plan, outcomes, written, read)
    counts = Counter("ok" if behaviour == COPY else behaviour for behaviour in plan.values())
    for behaviour, row in BEHAVIOURS.items():
        asked, expected = server.requests_of(behaviour), row.requests * counts[behaviour]
        if asked != expected and behaviour != "silent":
            wrong.append(f"{behaviour}: {asked} requests, expected {expected}")
    asked = server.requests_of("silent") - BEHAVIOURS["silent"].requests * counts["silent"]
    if asked >= DEAD_URLS:
        wrong.append(f"{DEAD}: {asked} requests, expected fewer than its {DEAD_URLS} URLs")
    return outcomes, wrong


def options_of(timeout: int) -> list[str]:
    return ["--timeout", str(timeout), "--retries", "1", "--allow-private-addresses", "--max-image-bytes", "5000000"]


def differences(plan: dict[str, str], outcomes: dict[str, str], written: dict[str, bytes], read: Any) -> list[str]:
    wrong = [
        f"{url}: {outcomes.get(url)}, expected {' or '.join(sorted(expected_of(behaviour)))}"
        for url, behaviour in plan.items()
        if outcomes.get(url) not in expected_of(behaviour)
    ]
    return wrong + [f"{url}: another picture" for url, content in written.items() if content != read(name_of(url))]


def name_of(url: str) -> str:
    return url.rpartition("/")[2].partition("?")[0]


def private_run(server: MisbehavingServer, folder: Path, names: list[str], read: Any) -> tuple[dict, list[str]]:
    """Redirects into a private network, for which this machine must not be private itself: it is a proxy here."""
    urls = [f"http://photos{n % 9}.test/{'ok' if n % 2 else 'to-private'}/{name}" for n, name in enumerate(names)]
    outcomes, written = prepare(folder, "private", urls, http_proxy=f"http://127.0.0.1:{server.port}")
    plan = {url: url.split("/")[3] for url in urls}
    row = tabulated({url: behaviour for url, behaviour in plan.items() if behaviour == "to-private"}, outcomes)[0]
    return row, differences(plan, outcomes, written, read)


def second_run(
    server: MisbehavingServer, folder: Path, plan: dict[str, str], outcomes: dict[str, str], read: Any, timeout: int
) -> tuple[dict[str, int], list[str]]:
    """What can still be had, once the server is well, by ``--retry-failed``: asked for once each, and nothing else."""
    server.recovered = True
    server.requests.clear()
    urls = [url for url in plan if can_change(outcomes.get(url, ""))]
    found, written = prepare(folder, "first", list(plan), *options_of(timeout), "--retry-failed")
    wrong = [f"{url}: {found.get(url)} in the second run" for url in urls if found.get(url) != WRITTEN]
    wrong += [f"{url}: another picture" for url, content in written.items() if content != read(name_of(url))]
    requests = Counter("/" + url.split("/", 3)[3] for url in urls)
    if server.requests != requests:
        wrong.append(f"second run: {server.requests.total()} requests, expected {requests.total()}, one for each URL")
    gained = sum(found.get(url) == WRITTEN for url in urls)
    return {"urls": len(urls), "written": gained, "requests": server.requests.total()}, wrong


def tabulated(plan: dict[str, str], outcomes: dict[str, str]) -> list[dict[str, Any]]:
    return [
        {
            "behaviour": behaviour,
            "urls": sum(other == behaviour for other in plan.values()),
            "outcomes": dict(Counter(outcomes.get(url, "none") for url in plan if plan[url] == behaviour)),
            "expected": sorted(expected_of(behaviour)),
        }
        for behaviour in sorted(set(plan.values()))
    ]


def print_table(table: list[dict[str, Any]]) -> None:
    print(f"{'behaviour':24} {'URLs':>5}  {'outcomes':44} expected")
    for row in table:
        outcomes = ", ".join(f"{count} {reason}" for reason, count in row["outcomes"].items())
        print(f"{row['behaviour']:24} {row['urls']:5}  {outcomes:44} {' or '.join(row['expected'])}")


if __name__ == "__main__":
    sys.exit(main())
