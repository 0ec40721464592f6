"""Watches the parts of a split being made, wherever: how far they are, when to give up."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from tqdm import tqdm

from data_prep.downloading.failures import diagnose
from data_prep.parts.claims import read_claim
from data_prep.parts.part import read_part
from data_prep.parts.plan import Plan
from data_prep.record import LowYieldError, PrepError
from data_prep.shard_writer import describe_counts

EARLY_CHECK_URLS = 2000
_POLL_SECONDS = 0.3
_POLL_SHARE = 0.05  # of the time may go into looking: with a hundred thousand parts it takes a while


@dataclass(frozen=True)
class WatchOptions:
    """``min_yield`` the share of downloads that must succeed; ``stall_seconds`` without any progress end the run, as
    does ``deadline_seconds`` in all."""

    min_yield: float = 0.1
    stall_seconds: float = 300.0
    deadline_seconds: float | None = None


@dataclass
class State:
    """Addresses tried, images received, failures by reason: over parts that are made, failed and being made."""

    seen: int = 0
    downloaded: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    done: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)
    trouble: str | None = None  # of this machine or its network, that kept a part from being downloaded


class Watch:
    """How far the parts of a plan are; what is finished is read once."""

    def __init__(self, plan: Plan, options: WatchOptions) -> None:
        self._plan, self._options = plan, options
        self._made = State()
        self.first = self.look()
        self._started = self._changed = time.monotonic()
        self._last: object = None

    def look(self) -> State:
        """The state at this moment."""
        made = self._made
        for name in _entries(self._plan.folder / "done"):
            number = int(name)
            if number not in made.done and self._plan.is_done(number):
                _add(made, vars(read_part(self._plan, number, whole=False)))
                made.done.add(number)
        now = State(made.seen, made.downloaded, Counter(made.failures), made.done)
        for name in _entries(self._plan.folder / "failed"):
            number = int(name.split(".")[0])
            if number not in made.done and (stored := self.failure(number)) is not None:
                now.failed.add(number)
                now.trouble = now.trouble or stored.get("trouble")
                _add(now, stored)
        for name in _entries(self._plan.folder / "claims"):
            number = int(name.split(".")[0])
            if number not in made.done | now.failed:
                _add(now, read_claim(self._plan, number))
        return now

    def failure(self, number: int) -> dict | None:
        """The counts of a part that failed."""
        try:
            return json.loads(self._plan.failure(number).read_bytes())
        except (OSError, ValueError):
            return None

    def check(self, state: State) -> None:
        """Raises LowYieldError or PrepError where going on is of no use."""
        if state.trouble is not None:
            raise LowYieldError(state.trouble)
        now, options = time.monotonic(), self._options
        if (found := (state.seen, len(state.done))) != self._last:
            self._last, self._changed = found, now
        if state.seen >= EARLY_CHECK_URLS and state.downloaded < options.min_yield * state.seen:
            raise too_low(state, options.min_yield)
        so_far = f"after {state.seen} of {self._plan.urls} URLs; run the same command to resume"
        if now - self._changed > options.stall_seconds:
            raise PrepError(f"download stalled {so_far}")
        if options.deadline_seconds is not None and now - self._started > options.deadline_seconds:
            raise PrepError(f"deadline passed {so_far}")

    def wait(self, is_over: Callable[[], bool]) -> State:
        """Show progress until ``is_over``; raises what ``check`` raises."""
        with tqdm(
            total=self._plan.urls,
            initial=self.first.seen,
            desc=f"downloading {self._plan.recipe.split}",
            unit="url",
            disable=not sys.stderr.isatty(),
            leave=False,
        ) as bar:
            over = False
            while not over:
                over = is_over()
                started = time.monotonic()
                state = self.look()
                bar.set_postfix_str(f"yield {state.downloaded / max(1, state.seen):.1%}", refresh=False)
                bar.update(state.seen - bar.n)
                if not over:
                    self.check(state)
                    time.sleep(max(_POLL_SECONDS, (time.monotonic() - started) / _POLL_SHARE))
        return state


def too_low(state: State, min_yield: float) -> LowYieldError:
    """The error of a run that gets too little, naming the reasons."""
    advice = _advice(state.failures, state.downloaded)
    share = f"{state.downloaded} of {state.seen} URLs ({state.downloaded / max(1, state.seen):.1%}) could be downloaded"
    return LowYieldError(f"only {share}, --min-yield is {min_yield:.1%}: {describe_counts(state.failures)}; {advice}")


def parts_failed(plan: Plan, failures: dict[int, dict], min_yield: float) -> LowYieldError:
    """The error of a run some of whose parts have too few images or rows, naming the reasons in these parts."""
    urls, downloaded, rows = (sum(one[name] for one in failures.values()) for name in ("urls", "downloaded", "rows"))
    reasons: Counter[str] = Counter()
    for one in failures.values():
        reasons.update(one["rejected"])
    return LowYieldError(
        f"{len(failures)} of {plan.parts} parts failed (such as {min(failures)}): only {downloaded} of {urls} URLs "
        f"could be downloaded and {rows} of {rows + sum(reasons.values())} rows used in them, --min-yield is "
        f"{min_yield:.1%}: {describe_counts(reasons)}; {_advice(reasons, downloaded)}; "
        "the next run tries these parts again"
    )


def _advice(failures: Counter[str], downloaded: int) -> str:
    return diagnose(failures | Counter(success=downloaded), {}) or "check network and proxy, or lower it"


def _add(state: State, counts: dict) -> None:
    state.seen += counts.get("seen", counts.get("urls", 0))
    state.downloaded += counts.get("downloaded", 0)
    state.failures.update(counts.get("failures", {}))


def _entries(folder: os.PathLike) -> list[str]:
    """Names in a folder of a plan, none where another process has sealed the split and removed it."""
    try:
        return [name for name in os.listdir(folder) if name[0] != "."]
    except FileNotFoundError:
        return []
