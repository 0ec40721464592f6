"""Who works on what: by files that are made exclusively and counters that move, on the reader's own clock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.parts import claims as module
from data_prep.parts.claims import FREE, HELD, MOVING, STALE, Claims
from data_prep.parts.plan import Plan
from tests.data_prep.parts.made_parts import planned, url_rows


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return planned(tmp_path, url_rows(30))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def elsewhere(plan: Plan, number: int, **change) -> None:
    """Let a claim be one of another machine."""
    path = plan.folder / "claims" / f"{number:05d}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "place": "another machine", **change}))


def test_a_part_is_claimed_once(plan: Plan) -> None:
    first = Claims(plan).take(1, "aa", "run")
    assert first is not None and Claims(plan).take(1, "bb", "run") is None
    assert Claims(plan).state(1) == HELD and Claims(plan).state(0) == FREE
    first.release()
    assert Claims(plan).take(1, "bb", "run") is not None


def test_a_claim_that_stands_still_is_taken_over_by_the_readers_clock(plan: Plan, clock: list[float]) -> None:
    """Its own times, and those of the file, say nothing: clocks of machines differ."""
    old = Claims(plan).take(1, "aa", "run")
    elsewhere(plan, 1, beats=5)
    os.utime(plan.folder / "claims" / "00001.json", (0, 0))
    (plan.folder / "attempts" / "aa").mkdir()
    reader = Claims(plan, stale_seconds=60)
    assert reader.take(1, "bb", "run") is None
    clock[0] += 59
    assert reader.state(1) == HELD
    elsewhere(plan, 1, beats=6)
    assert reader.state(1) == MOVING
    clock[0] += 59
    assert reader.take(1, "bb", "run") is None
    clock[0] += 2
    assert reader.state(1) == STALE
    new = reader.take(1, "bb", "run")
    assert new is not None and not (plan.folder / "attempts" / "aa").exists()
    old.beat(seen=1)  # who believed itself the owner changes nothing any more
    old.release()
    assert json.loads((plan.folder / "claims" / "00001.json").read_text())["attempt"] == "bb"


def test_a_claim_of_a_process_that_has_ended_is_free_at_once(plan: Plan) -> None:
    code = "import sys; from pathlib import Path; from data_prep.parts.claims import Claims; "
    code += "from data_prep.parts.plan import open_plan; Claims(open_plan(Path(sys.argv[1]))).take(2, 'aa', 'run')"
    subprocess.run([sys.executable, "-c", code, str(plan.folder)], check=True, cwd=Path(__file__).parents[3])
    assert Claims(plan).state(2) == STALE and Claims(plan).take(2, "bb", "run") is not None


def test_a_counter_that_moves_is_seen_with_what_it_tells(plan: Plan) -> None:
    claim = Claims(plan).take(3, "aa", "run")
    reader = Claims(plan)
    assert reader.state(3) == HELD
    claim.beat(seen=12)
    assert reader.state(3) == MOVING and module.read_claim(plan, 3)["seen"] == 12


@pytest.mark.parametrize("content", ["", "[]", "{", '{"attempt": "../../x", "place": 3, "pid": {}, "start": []}'])
def test_a_claim_that_is_not_one_is_taken_over_after_a_while(plan: Plan, clock: list[float], content: str) -> None:
    (plan.folder / "claims" / "00000.json").write_text(content)
    reader = Claims(plan, stale_seconds=60)
    assert reader.take(0, "bb", "run") is None
    clock[0] += 61
    assert reader.take(0, "bb", "run") is not None


def test_claims_of_a_run_are_removed_with_its_attempts(plan: Plan) -> None:
    for number, run in enumerate(("mine", "mine", "other")):
        Claims(plan).take(number, f"a{number}", run)
        (plan.folder / "attempts" / f"a{number}").mkdir()
    Claims(plan).clear_run("mine")
    assert os.listdir(plan.folder / "claims") == ["00002.json"] and os.listdir(plan.folder / "attempts") == ["a2"]


def test_a_link_in_place_of_a_claim_is_not_followed(plan: Plan, tmp_path: Path) -> None:
    (plan.folder / "claims" / "00000.json").symlink_to(tmp_path / "target")
    assert Claims(plan).take(0, "aa", "run") is None and not (tmp_path / "target").exists()
