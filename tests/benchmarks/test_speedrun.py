"""The speedrun without its trainings: budgets, rows, curves, and the whole course with a stand-in for training."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from benchmarks.speedrun.__main__ import NEIGHBOURS, Speedrun, main
from benchmarks.speedrun.curves import Point, Run, clock_of, reached, time_to_target
from benchmarks.speedrun.jobs import Stopped
from benchmarks.speedrun.options import parse
from benchmarks.speedrun.plan import (
    ROUNDS,
    Budget,
    Cost,
    accept_command,
    calibration_order,
    cost_of,
    hours_of_training,
    steps_within,
    too_few_steps,
)
from benchmarks.speedrun.rows import FOLDER, Row, load_rows
from pipeline.config.options import Config, ConfigError, OptimConfig
from pipeline.distributed.preempt import SIGNALS
from tests.benchmarks.test_speedrun_jobs import python
from tests.tiny_corpus import make_corpus

DEMO = ["--recipe", "demo"]


def row(share: float = 1.0, batch_size: int = 64) -> Row:
    return Row("flm", {}, share, Config(optim=OptimConfig(batch_size=batch_size)))


@pytest.mark.parametrize(
    ("budget", "share", "expected"),
    [
        (Budget("minutes", 10), 1.0, 2000),  # 600 s of 0.3 s each
        (Budget("minutes", 10), 0.4, 800),
        (Budget("tflop", 100), 1.0, 780),  # 100,000 GFLOP of 2 x 64 each: 781.25
        (Budget("steps", 104), 1.0, 100),
        (Budget("steps", 5), 1.0, 5),
    ],
)
def test_steps_fill_the_budget_and_evaluations_divide_them(budget: Budget, share: float, expected: int) -> None:
    assert steps_within(budget, row(share), Cost(0.3, 2.0), evaluations=5) == expected


def test_a_budget_too_small_says_how_much_is_needed() -> None:
    with pytest.raises(ConfigError, match="row flm: 0.01 minutes last for 0.8 steps.*give at least 0.0625"):
        steps_within(Budget("minutes", 0.01), row(0.4), Cost(0.3, 2.0), evaluations=5)


def test_the_hours_of_the_whole_command_are_known_before_it_begins() -> None:
    """README's line: 10 minutes for each of eight rows, two of them with 0.4 and 0.6 of it, and three seeds."""
    rows = load_rows("objectives", DEMO, None)
    shares = [1.0] * (len(rows) - 2) + [0.4, 0.6]
    assert hours_of_training(Budget("minutes", 10), rows, 3, 1) == pytest.approx(10 * sum(shares) * 3 / 60)
    assert hours_of_training(Budget("minutes", 10), rows, 3, 2) == pytest.approx(10 * sum(shares) * 3 / 120)
    assert hours_of_training(Budget("steps", 10), rows, 3, 1) is None


def test_trainings_too_short_to_tell_rows_apart_are_said() -> None:
    assert too_few_steps("flm", 100) is None
    assert too_few_steps("flm", 15).startswith("warning: row flm trains for 15 steps")


def test_the_cost_is_the_lower_quartile_without_the_first_lines() -> None:
    def line(seconds: float, kind: str = "train") -> dict:
        return {"kind": kind, "step_seconds": seconds, "gflop_per_sample": 10 * seconds}

    rounds = [[line(9.0, "eval"), line(90.0), line(80.0), line(1.0), line(2.0)], [line(70.0), line(60.0), line(6.0)]]
    rounds += [[line(50.0), line(40.0), line(3.0)]]
    assert cost_of(rounds) == Cost(2.0, 30.0)
    with pytest.raises(ConfigError, match="--calibration-steps"):
        cost_of([[line(1.0), line(1.0)]])


@pytest.mark.parametrize("count", range(1, 10))
def test_each_round_of_calibration_has_all_rows_and_other_neighbours(count: int) -> None:
    rows = list(range(count))
    orders = [calibration_order(rows, number) for number in range(ROUNDS)]
    assert all(sorted(order) == rows for order in orders)
    pairs = [{frozenset(order[i : i + 2]) for i in range(0, count - 1, 2)} for order in orders]
    if count > 2 and count % 2 == 0:
        assert not (pairs[0] & pairs[1] or pairs[0] & pairs[2] or pairs[1] & pairs[2])


def test_a_target_is_reached_where_the_line_first_crosses_it() -> None:
    assert reached([0, 10, 20, 30], [0.0, 0.2, 0.6, 0.9], 0.5) == pytest.approx(17.5)
    assert reached([0, 10, 20, 30], [0.0, 0.8, 0.1, 0.9], 0.4) == pytest.approx(5)  # the first time
    assert reached([0, 10], [0.0, 0.5], 0.5) == 10
    assert reached([0, 10], [0.0, 0.5], 0.51) is None
    assert reached([0, 10], [0.6, 0.5], 0.51) == 0


def line_run(name: str, seed: int, values: list[float]) -> Run:
    points = [Point(10 * n, 100.0 * n, 1.0 * n, 640 * n, {"vqa_accuracy": value}) for n, value in enumerate(values)]
    return Run(name, seed, points)


def test_ratios_are_those_of_mlms_mean_curve_to_each_seed() -> None:
    runs = {
        "mlm_15": [line_run("mlm_15", seed, [0.0, 0.1, 0.2]) for seed in range(3)],
        "mlm_40": [line_run("mlm_40", 0, [0.0, 0.2, 0.4]), line_run("mlm_40", 1, [0.0, 0.4, 0.8])],  # mean 0, .3, .6
        "flm": [line_run("flm", 0, [0.0, 0.6, 0.7]), line_run("flm", 1, [0.0, 0.0, 0.5])],
    }
    found = time_to_target(runs, ["mlm_15", "mlm_40"], "vqa_accuracy", "seconds")
    assert found["reference"] == "mlm_40" and found["target"] == pytest.approx(0.6)
    assert found["reference_cost"] == pytest.approx(200)
    flm = found["rows"]["flm"]
    assert flm["cost"] == [pytest.approx(100), None] and flm["seeds_there"] == 1
    assert flm["ratio"] == {"median": pytest.approx(1), "min": 0, "max": pytest.approx(2)}
    assert found["rows"]["mlm_40"]["cost"] == [None, pytest.approx(150)]
    assert found["rows"]["mlm_15"]["seeds_there"] == 0
    assert time_to_target(runs, [], "vqa_accuracy", "seconds") is None
    flat = {"mlm": [line_run("mlm", 0, [0.5, 0.5])]}
    assert time_to_target(flat, ["mlm"], "vqa_accuracy", "tflop") is None  # nothing was learnt


def test_the_clock_counts_each_line_for_the_steps_since_the_one_before() -> None:
    records = [
        {"step": 10, "step_seconds": 0.5, "gflop_per_sample": 2.0},
        {"step": 12, "step_seconds": 3.0, "gflop_per_sample": 1.0},
        {"step": 20, "step_seconds": 0.25, "gflop_per_sample": 1.0},
    ]
    clock = clock_of(records, batch_size=100)
    assert clock[12] == pytest.approx((11.0, 2.2)) and clock[20] == pytest.approx((13.0, 3.0)) and clock[0] == (0, 0)


def test_another_command_in_the_same_folder_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "speedrun.json"
    before = {"budget": "10 minutes", "row flm": "trained", "row flm, optim.learning_rate": 0.002}
    accept_command(path, before, [0, 1])
    accept_command(path, before | {"row flm, objective.new_option": 3}, [0, 1, 2])  # a newer program, one more seed
    with pytest.raises(ConfigError, match="budget: '10 minutes' there, '5 minutes' here"):
        accept_command(path, before | {"budget": "5 minutes"}, [0, 1, 2])
    with pytest.raises(ConfigError, match="row flm, optim.learning_rate: 0.002 there, 0.001 here"):
        accept_command(path, before | {"row flm, optim.learning_rate": 0.001}, [0, 1, 2])
    with pytest.raises(ConfigError, match="row mlm only here"):
        accept_command(path, before | {"row mlm": "trained"}, [0, 1, 2])
    with pytest.raises(ConfigError, match=r"row flm only there; seeds \[1, 2\] only there"):
        accept_command(path, {"budget": "10 minutes"}, [0])


STAND_IN = """
import json, pathlib, sys, time
what, folder, settings = sys.argv[1], pathlib.Path(sys.argv[2]), json.loads(sys.argv[3])
folder.mkdir(parents=True, exist_ok=True)
with open(folder.parents[2] / "launches", "a") as file:
    file.write(f"{what} {folder.parent.name}/{folder.name}\\n")
if settings.get("wait"):
    time.sleep(60)
if what == "train":
    steps, every = settings["train.steps"], settings.get("train.save_every") or settings["train.log_every"]
    slow = 4.0 if settings["objective"] == "mlm" else 1.0
    with open(folder / "log.jsonl", "w") as log:
        for step in sorted([*range(0, steps + 1, every), 7]):  # 7: a checkpoint that a bad step left
            line = {"kind": "train", "step": step, "step_seconds": 0.1 * slow, "gflop_per_sample": 0.5 * slow}
            if step:
                log.write(json.dumps(line) + "\\n")
            if step in (0, steps):
                log.write(json.dumps({"kind": "eval", "step": step, "loss": 5.0 - 2 * step / steps}) + "\\n")
    (folder / "beat").write_text(str(every))
    starts = {"text": {"taken": None}, "vision": {"taken": f"/{folder.name}/tower.pth"}}
    noted = {"starting_weights": starts, "git_revision": "0123456789abcdef", "git_changed": True}
    (folder / "environment.json").write_text(json.dumps(noted))
else:
    every, records = int((folder / "beat").read_text()), (folder / "log.jsonl").read_text().splitlines()
    steps = max(json.loads(record)["step"] for record in records)
    with open(folder / "probes.jsonl", "w") as probes:
        for step in sorted([*range(0, steps + 1, every), 7]):  # 7: a checkpoint that a bad step left
            values = {"vqa_accuracy": min(1.0, step / 600), "vqa_blind": 0.25, "caption_cider_d": 0.5, "seconds": 1.0}
            values["caption_blind_cider_d"] = 0.125
            probes.write(json.dumps({"step": step, **values, "skipped": {"caption": "a stand-in"}}) + "\\n")
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("speedrun") / "data", train=40, dev=10)


class Stubbed(Speedrun):
    """A speedrun whose trainings and probes only pretend."""

    wait = False

    def _train(self, row: Row, folder: Path, settings: dict) -> list[str]:
        more = {"objective": row.config.objective.name, "wait": self.wait}
        return python(STAND_IN, "train", str(folder), json.dumps(settings | more))

    def _probe(self, folder: Path) -> list[str]:
        return python(STAND_IN, "probe", str(folder), "{}")


def speedrun(data: Path, output: Path, *options: str, seeds: tuple[int, ...] = (0, 1)) -> Stubbed:
    words = ["--data", str(data), "--output", str(output), "--only", "flm", "mlm_40", "flm_at_40_percent", *options]
    made = Stubbed(parse([*words, "--seeds", *map(str, seeds)], ""))
    os.close(made.lock)
    return made


@pytest.fixture
def handlers():
    """Puts the handlers of signals back that a speedrun sets."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.slow
def test_the_whole_course_with_a_stand_in_for_training(data, tmp_path, handlers, capsys) -> None:
    output = tmp_path / "out"
    budget = ["--budget-minutes", "2", "--evaluations", "4", "--jobs", "2"]
    assert speedrun(data, output, *budget).run() == 0
    results = json.loads((output / "results.json").read_text())
    steps = {run["row"]: run["points"][-1]["step"] for run in results["runs"]}
    assert steps == {"flm": 1200, "mlm_40": 300, "flm_at_40_percent": 480}
    assert len(results["runs"]) == 6 and all(len(run["points"]) == 5 for run in results["runs"])
    ratio = results["time_to_target"]["vqa_accuracy"]["seconds"]
    assert ratio["reference"] == "mlm_40" and ratio["reference_cost"] == pytest.approx(120)
    assert ratio["rows"]["flm"]["ratio"]["median"] == pytest.approx(4) and ratio["rows"]["flm"]["seeds_there"] == 2
    table = (output / "table.md").read_text()
    assert "| flm | 1200 | 76800 | 120 |" in table and "25.0 %" in table and "caption (a stand-in)" in table
    assert "by revision 0123456789ab with changes." in table
    assert "5.00 to 3.00" in table and "0.375 (0.375 to 0.375)" in table
    assert (output / "curves.svg").read_text().count("<svg") == 1
    for name in ("results.json", "table.md", "curves.svg"):
        assert str(tmp_path) not in (output / name).read_text()

    launches = (output / "launches").read_text().splitlines()
    assert len(launches) == 3 * 2 + 2 * 6  # three rounds of two distinct rows; a training and its probes each
    (output / "runs" / "mlm_40" / "seed_1" / "done.json").unlink()
    capsys.readouterr()
    assert speedrun(data, output, *budget).run() == 0
    assert "6 trainings, 5 of them done" in capsys.readouterr().out
    again = (output / "launches").read_text().splitlines()[len(launches) :]
    assert again == ["train mlm_40/seed_1", "probe mlm_40/seed_1"]
    assert speedrun(data, output, *budget, "--target", "flm").report([]) == 0
    ratio = json.loads((output / "results.json").read_text())["time_to_target"]["vqa_accuracy"]["seconds"]
    assert ratio["reference"] == "flm" and ratio["rows"]["mlm_40"]["seeds_there"] == 0
    with pytest.raises(ConfigError, match="--target: found 'mlm_15', expected rows: flm, mlm_40, flm_at_40_percent"):
        speedrun(data, output, *budget, "--target", "mlm_15")
    note = output / "runs" / "flm" / "seed_0" / "done.json"
    note.write_text(note.read_text().replace("null", '"roberta-base"'))
    assert speedrun(data, output, *budget).run() == 1
    assert "did not start from the same weights" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="another command .budget: '2 minutes' there, '3 minutes' here"):
        speedrun(data, output, "--budget-minutes", "3", *budget[2:])


@pytest.mark.parametrize(("part", "option"), [("connector", "pretrained"), ("language", "name")])
def test_only_rows_that_ask_for_the_same_weights_must_begin_with_them(data, tmp_path, part, option) -> None:
    made, asked = speedrun(data, tmp_path, "--steps", "20"), (None, "./own", None)
    for each, folder in zip(made.rows, asked, strict=True):
        setattr(getattr(each.config.model, part), option, folder)
    runs = [Run(each.name, 0, starting_weights={part: folder}) for each, folder in zip(made.rows, asked, strict=True)]
    assert not made._unequal_starts(runs)
    runs[2].starting_weights = {part: "./own"}
    assert f"row {runs[0].row}, seed 0 from {{'{part}': None}}" in made._unequal_starts(runs)[0]


@pytest.mark.slow
def test_a_signal_ends_it_and_the_same_command_goes_on(data, tmp_path, handlers) -> None:
    output = tmp_path / "out"
    first = speedrun(data, output, "--steps", "600")
    first.wait = True

    def tell() -> None:
        while not (output / "launches").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=tell, daemon=True).start()
    with pytest.raises(Stopped) as stopped:
        first.run()
    assert stopped.value.exit_code == 75
    assert speedrun(data, output, "--steps", "600").run() == 0
    assert len((output / "launches").read_text().splitlines()) == 1 + 2 * 6


@pytest.mark.slow
def test_a_failed_training_is_named_with_its_log(data, tmp_path, handlers, capsys) -> None:
    class Broken(Stubbed):
        def _train(self, row: Row, folder: Path, settings: dict) -> list[str]:
            if row.name == "mlm_40" and folder.name == "seed_1":
                return python("raise SystemExit('the loss is not finite')")
            return super()._train(row, folder, settings)

    made = speedrun(data, tmp_path / "out", "--steps", "600")
    made.__class__ = Broken
    assert made.run() == 1
    error = capsys.readouterr().err
    assert "row mlm_40, seed 1 ended with exit code 1" in error and "seed_1.out" in error and "not finite" in error
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["runs"]) == 5


@pytest.mark.slow
def test_mistakes_are_one_line(data, tmp_path, capsys) -> None:
    words = ["--data", str(data), "--output", str(tmp_path / "out"), "--steps", "9"]
    assert main([*words, "--rows", "nothing"]) == 2
    assert main([*words, "--recipe", "nothing"]) == 2
    assert main([*words[2:], "--data", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.count("\n") == 3 and not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as left:
        main([*words, "--budget-minutes", "3"])
    assert left.value.code == 2
    assert main([*words, "--report-only"]) == 2
    assert "found no speedrun to report on" in capsys.readouterr().err


def test_its_own_recipes_go_by_their_names_and_others_as_for_training() -> None:
    words = ["--data", "d", "--output", "o", "--steps", "5", "--recipe"]
    for name in ("photos", "photos_evlgen", "photos_qformer_stage1", "photos_trained", "scenes", "scenes_evlgen"):
        assert Path(parse([*words, name], "").recipe) == FOLDER.parent / "recipes" / f"{name}.yaml"
    assert [parse([*words, name], "").recipe for name in ("flm_tiny", "own.yaml")] == ["flm_tiny", "own.yaml"]


def test_a_calibrated_clock_does_not_see_what_else_ran() -> None:
    lines = [{"step": 5, "step_seconds": 9.0, "gflop_per_sample": 2.0}]
    assert clock_of(lines, batch_size=4) == {0: (0.0, 0.0), 5: (45.0, 0.04)}
    assert clock_of(lines, batch_size=4, step_seconds=0.5) == {0: (0.0, 0.0), 5: (2.5, 0.04)}


def test_what_was_found_meanwhile_does_not_make_it_another_command(data: Path, tmp_path: Path) -> None:
    """Captions of neighbours are scored at the end; other fine-tunings are another command."""
    words = ["--steps", "20", "--evaluations", "1", "--finetune"]
    speedrun(data, tmp_path, *words, "coco_caption=2")
    (tmp_path / NEIGHBOURS).write_text('{"person": 0.9}')
    again = speedrun(data, tmp_path, *words, "coco_caption=2")
    assert again._facts()["neighbours"] == {"person": 0.9}
    with pytest.raises(ConfigError, match="belongs to another command"):
        speedrun(data, tmp_path, *words, "coco_caption=3")
