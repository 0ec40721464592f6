"""Which row is downloaded next, on a clock of the test: hosts are spared, what failed for now comes again."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest

from data_prep.downloading.courtesy import Courtesy
from data_prep.downloading.turns import FAILURES_IN_A_ROW, MAX_RESTS, REST_SECONDS, Row, Turns, host_of

Outcome = tuple[str | None, float | None]  # reason, Retry-After
OK: Outcome = (None, None)


class Simulation:
    """``threads`` that download rows, each in ``seconds`` of a clock that stands still but for them."""

    def __init__(
        self, urls: list[str], courtesy: Courtesy, retries: int = 1, threads: int = 16, failing: dict | None = None
    ) -> None:
        self.now = 0.0
        self.turns = Turns(enumerate(urls), threads, courtesy, retries, lambda: self.now, failing)
        self.threads = threads
        self.running: list[tuple[float, Row]] = []
        self.started: list[tuple[float, str]] = []
        self.outcomes: dict[int, str | None] = {}
        self.ended_at: dict[int, float] = {}
        self.most: Counter[str] = Counter()  # host -> connections at a time

    def run(self, outcome: Callable[[Row], Outcome], seconds: Callable[[Row], float] = lambda row: 1.0) -> Simulation:
        for _ in range(100_000):
            found = self.turns.take() if len(self.running) < self.threads else 3600.0
            if found is None:
                return self
            if isinstance(found, Row):
                self._start(found, 0.0 if found.host.given_up else seconds(found))
                continue
            wake = min([self.now + found, *(end for end, _ in self.running)])
            assert wake > self.now or any(end <= self.now for end, _ in self.running), "waits for nothing"
            self.now = wake
            for end, row in [entry for entry in self.running if entry[0] <= self.now]:
                self.running.remove((end, row))
                self._end(row, outcome)
        raise AssertionError("does not end")

    def _start(self, row: Row, seconds: float) -> None:
        self.running.append((self.now + seconds, row))
        if not row.host.given_up:
            self.started.append((self.now, row.url))
            at_work = Counter(host_of(other.url) for _, other in self.running)
            self.most |= at_work

    def _end(self, row: Row, outcome: Callable[[Row], Outcome]) -> None:
        reason, retry_after = ("given_up", None) if row.host.given_up else outcome(row)
        row.error = str(reason)
        if self.turns.settle(row, reason, retry_after):
            assert row.key not in self.outcomes
            self.outcomes[row.key], self.ended_at[row.key] = reason, self.now


def urls_of(host: str, count: int) -> list[str]:
    return [f"http://{host}.test/{number}" for number in range(count)]


def test_a_host_has_so_many_connections_and_others_go_on() -> None:
    done = Simulation(urls_of("a", 40) + urls_of("b", 4), Courtesy(per_host=3)).run(lambda row: OK)
    assert done.most == {"a.test:80": 3, "b.test:80": 3}
    assert set(done.outcomes.values()) == {None} and len(done.outcomes) == 44
    assert max(done.ended_at[key] for key in range(40, 44)) == 2.0  # b does not wait for the 40 of a
    assert done.now == 14.0  # ceil(40 / 3)


def test_an_interval_between_two_connections_is_kept() -> None:
    done = Simulation(urls_of("a", 5) + urls_of("b", 5), Courtesy(host_interval=2.5)).run(lambda row: OK)
    for host in ("a", "b"):
        times = [time for time, url in done.started if f"//{host}." in url]
        assert times == [0.0, 2.5, 5.0, 7.5, 10.0]


@pytest.mark.parametrize(
    ("reason", "tries"),
    [
        *[(reason, 3) for reason in ("timeout", "connection_failed", "http_500", "http_429", "http_503", "http_522")],
        *[(reason, 3) for reason in ("dns_failure", "tls_failure", "proxy_failed")],
        *[(reason, 1) for reason in ("http_404", "http_410", "http_403", "http_501", "private_address", "bad_url")],
        *[(reason, 1) for reason in ("html_page", "disallowed_by_server", "image_bytes_too_large", None)],
    ],
)
def test_only_what_can_change_is_tried_again(reason: str | None, tries: int) -> None:
    done = Simulation(urls_of("a", 1), Courtesy(), retries=2).run(lambda row: (reason, None))
    assert len(done.started) == tries and done.outcomes == {0: reason}


def test_retry_after_is_heeded_for_the_whole_host_up_to_a_bound() -> None:
    def outcome(row: Row) -> Outcome:
        return ("http_429", 7.0) if row.key == 0 and row.tries == 1 else OK

    done = Simulation(urls_of("a", 3), Courtesy(per_host=1)).run(outcome)
    assert [time for time, _ in done.started] == [0.0, 8.0, 9.0, 10.0] and set(done.outcomes.values()) == {None}
    late = Simulation(urls_of("a", 1), Courtesy(max_wait=5.0)).run(outcome)
    assert late.outcomes == {0: "http_429"} and late.now == 1.0


def test_a_dead_host_is_left_alone_and_does_not_hold_the_threads() -> None:
    """8 of 16 threads wait for a at first; when it has failed often enough, one, then none."""
    dead = lambda row: ("timeout", None) if "//a." in row.url else OK  # noqa: E731
    done = Simulation(urls_of("a", 200) + urls_of("b", 200), Courtesy(), retries=0).run(
        dead, lambda row: 30.0 if "//a." in row.url else 1.0
    )
    asked = sum("//a." in url for _, url in done.started)
    assert asked <= 8 + FAILURES_IN_A_ROW + MAX_RESTS
    assert Counter(done.outcomes[key] for key in range(200)) == {"timeout": asked, "given_up": 200 - asked}
    assert all(done.outcomes[key] is None for key in range(200, 400))
    assert max(done.ended_at[key] for key in range(200, 400)) == 25.0  # 200 by 8 at a time
    assert done.now <= 30.0 * (2 + MAX_RESTS) + REST_SECONDS * (2**MAX_RESTS - 1) + 1.0


def test_a_dead_host_is_asked_once_in_each_further_part() -> None:
    """Its rows are spread over the parts, too few in each to tell."""
    failing: dict = {}
    dead = lambda row: ("timeout", None)  # noqa: E731
    asked = [len(Simulation(urls_of("a", 3), Courtesy(), 1, 16, failing).run(dead).started) for _ in range(5)]
    assert asked == [6, 2, 1, 1, 1]  # two tries of each row, until two rests were of no use
    back = Simulation(urls_of("a", 30), Courtesy(), 1, 16, failing).run(lambda row: OK)
    assert set(back.outcomes.values()) == {None} and back.most == {"a.test:80": 8} and failing == {}


def test_a_host_that_comes_back_has_all_its_rows() -> None:
    def outcome(row: Row) -> Outcome:
        return ("timeout", None) if row.started < 12.0 else OK

    done = Simulation(urls_of("a", 50), Courtesy()).run(outcome)
    assert set(done.outcomes.values()) == {None} and done.most == {"a.test:80": 8}


def test_names_that_failed_are_asked_again_last_by_fewer_threads_and_once_for_all_rows() -> None:
    """img2dataset#361: an overrun resolver; the names are there."""
    urls = [f"http://h{number}.test/" for number in range(64)] + urls_of("a", 30)
    first = lambda row: ("dns_failure", None) if row.tries == 1 and "//h" in row.url else OK  # noqa: E731
    done = Simulation(urls, Courtesy(), threads=32).run(first)
    assert set(done.outcomes.values()) == {None}
    again = [time for time, url in done.started if "//h" in url][64:]
    assert min(again) >= max(done.ended_at[key] for key in range(64, 94))
    assert max(Counter(again).values()) == 4  # of 32
    gone = Simulation(urls_of("gone", 500), Courtesy()).run(lambda row: ("dns_failure", None))
    assert len(gone.started) < 30 and len(gone.outcomes) == 500


def test_every_row_comes_to_an_end_whatever_servers_do() -> None:
    reasons = [None, "http_404", "http_500", "timeout", "dns_failure", "http_429", "connection_failed"]
    for seed in range(200):
        draw = random.Random(seed)
        urls = [f"http://{draw.choice('abcde')}.test/{number}" for number in range(draw.randrange(60))]
        bad = {f"{host}.test:80": draw.choice(reasons) for host in "abc"}

        def outcome(row: Row, draw: random.Random = draw, bad: dict = bad) -> Outcome:
            reason = bad.get(host_of(row.url), draw.choice(reasons))
            return reason, draw.choice([None, 0.0, 3.0, 1e6]) if reason == "http_429" else None

        courtesy = Courtesy(per_host=draw.randrange(1, 4), host_interval=draw.choice([0.0, 0.5]))
        done = Simulation(urls, courtesy, draw.randrange(3), draw.randrange(1, 9)).run(
            outcome, lambda row, draw=draw: draw.choice([0.1, 1.0, 30.0])
        )
        assert sorted(done.outcomes) == list(range(len(urls)))
        assert all(count <= courtesy.per_host for count in done.most.values())
