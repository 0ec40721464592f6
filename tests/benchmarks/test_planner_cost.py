"""The benchmarks of the planner and of weak scaling: what they fit and compare, without running a training."""

from __future__ import annotations

import pytest

from benchmarks.cost import planner, weak_scaling
from benchmarks.cost.planner import Counted, fit, judged, machine_of, units, words_of
from benchmarks.cost.training_ranks import Trained
from pipeline.config.command_line import parse_command_line
from pipeline.planning.activations import Activations
from pipeline.planning.counts import Parameters, Work
from pipeline.planning.memory import CPU, Zero, memory_of
from pipeline.planning.speed import demands_of, speed_of

TRUE = {"flops": 4e-11, "states": 2e-10, "summed": 1e-9, "gathered": 5e-9, "operations": 2e-5, "hooked": 7e-4}


def counted(number: int, ranks: int) -> Counted:
    parameters = Parameters(groups=((10**6 * number, 4 * 10**6),), frozen_sizes=(), modules=100 + 10 * number)
    activations = Activations(0, 10**7, 10**7, 10**7, 0, operations=300 + 70 * number**2, traffic=10**8 * (7 - number))
    work = Work(8, 100, 1e10 * (1 + number % 3), 0.0, 0, activations)
    zero = Zero(number % 4, 4)
    demands = demands_of(parameters, work, zero, ranks, 1, "cpu")
    memory = memory_of(parameters, activations, zero, ranks, 1, CPU)
    return Counted(ranks, 1, zero, parameters, work, demands, memory)


def seconds(one: Counted) -> float:
    return sum(TRUE[key] * value for key, value in units(one).items())


def test_constants_are_found_again() -> None:
    counts = {f"{number}": counted(number, 1 + number % 2) for number in range(1, 13)}
    found = fit(counts, {name: seconds(one) for name, one in counts.items()})
    for name, one in counts.items():
        speed = speed_of(one.demands, machine_of(found), one.work, one.ranks, 1)
        assert speed.step_seconds == pytest.approx(seconds(one), rel=0.01), name


def test_planned_and_measured_stand_side_by_side() -> None:
    counts = {name: counted(number, ranks[0]) for number, (name, ranks) in enumerate(planner.CONFIGURATIONS.items(), 1)}
    tried = {
        name: [Trained([one.memory.peak, one.memory.peak // 2], [9.0, 9.0, seconds(one), seconds(one) + 0.1])] * 2
        for name, one in counts.items()
    }
    found = judged(counts, tried)["configurations"]
    assert set(found) == set(counts)
    assert all(row["memory_off"] == 0 for row in found.values())
    judged_ones = [row for row in found.values() if not row["fitted"]]
    assert len(judged_ones) >= 4


@pytest.mark.slow
def test_every_stage_is_judged_by_six_configurations_or_more() -> None:
    stages = [stage for _, stage, *_ in planner.CONFIGURATIONS.values()]
    assert len(stages) >= 6 and set(stages) == {0, 1, 2, 3}
    assert {ranks for ranks, *_ in planner.CONFIGURATIONS.values()} == {1, 2}
    assert set(planner.FITTED) < set(planner.CONFIGURATIONS)
    for name in planner.CONFIGURATIONS:
        assert parse_command_line(words_of(name)).config.train.steps > planner.NOT_COUNTED


def test_weak_scaling_is_a_share_of_its_bound() -> None:
    found = weak_scaling.ratios({"alone": 1.0, "independent": 1.25, "two ranks": 1.6})
    assert found == {"bound": 0.8, "weak scaling": 0.625, "share of the bound": 0.7812}
    slow_start = Trained([1], [9.0, 9.0, 9.0, 1.0, 3.0, 2.0])
    assert weak_scaling.seconds_of(slow_start) == 2.0


def test_too_few_steps_are_refused(capsys: pytest.CaptureFixture) -> None:
    for parse in (planner.parse, weak_scaling.parse):
        with pytest.raises(SystemExit):
            parse(["--steps", "2"])
        assert "are not counted; give more" in capsys.readouterr().err
