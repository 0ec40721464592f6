"""What a run reports: held-out means over every sample once, log values, unusable samples against their budget."""

from __future__ import annotations

import copy
import json
import types
from pathlib import Path

import pytest
import torch

from pipeline.config.options import DataConfig
from pipeline.distributed.preempt import StopRequest
from pipeline.distributed.ranks import Agreement
from pipeline.engine.engine import StepResult
from pipeline.loading.unusable import UnusableSamples
from pipeline.tasks.evaluation import evaluate
from pipeline.tasks.pretraining import held_out_pass
from pipeline.training.meter import StepMeter
from tests.forked_ranks import run_ranks
from tests.rounding import rounding
from tests.tiny_objective import TinyObjective, tiny_batch


class FakeLoader:
    """Batch k of all belongs to rank k mod world, as pipeline/loading/batch_positions.py deals them out."""

    def __init__(self, batches: list[list[int]], rank: int, world: int) -> None:
        self._mine, self.most_batches = batches[rank::world], -(-len(batches) // world)

    def __iter__(self):
        return iter([tiny_batch(samples) for samples in self._mine])


BATCHES = [[0, 1, 2], [3, 4], [5, 6, 7], [8], [9, 10]]


def held_out(place, shuffled: bool = False) -> dict[str, float] | None:
    torch.manual_seed(3)
    model = TinyObjective().eval()
    passes = [held_out_pass(FakeLoader(BATCHES, place.rank, place.world_size), tiny_batch([99]), model.term_weights)]
    if shuffled:
        other = FakeLoader(BATCHES[::-1], place.rank, place.world_size)
        passes.append(held_out_pass(other, tiny_batch([99]), model.term_weights, "shuffled/"))
    return evaluate(lambda function, batch: function(model, batch), passes, Agreement(), StopRequest())


def test_evaluation_counts_every_sample_once_on_any_number_of_ranks() -> None:
    """3 ranks get 2, 2 and 1 of 5 batches: the dry one computes along without counting."""
    torch.manual_seed(3)
    model = TinyObjective().eval()
    joined = tiny_batch([sample for batch in BATCHES for sample in batch])
    expected = {}
    for name, (loss, correct) in model.score(joined).items():
        expected[f"{name}_loss"] = float(loss) / joined.counts[name]
        expected[f"{name}_accuracy"] = float(correct) / joined.counts[name]
    expected["loss"] = sum(weight * expected[f"{name}_loss"] for name, weight in model.term_weights.items())
    for world_size in (1, 3):
        for found in run_ranks(world_size, held_out):
            assert found == pytest.approx(expected, abs=rounding(100))  # fp32 means of fewer than 100 losses


def test_shuffled_values_stand_beside_the_true_ones() -> None:
    [found] = run_ranks(1, held_out, True)
    assert found["shuffled/flm_loss"] == pytest.approx(found["flm_loss"], abs=rounding(100))  # the same samples here
    assert "shuffled/loss" not in found


def test_evaluation_stops_when_told() -> None:
    model = TinyObjective().eval()
    stop = StopRequest()
    stop.signal_name = "SIGTERM"
    passes = [held_out_pass(FakeLoader(BATCHES, 0, 1), tiny_batch([99]), model.term_weights)]
    assert evaluate(lambda function, batch: function(model, batch), passes, Agreement(), stop) is None


def engine(skipped_steps: int, forward_seconds: float = 0.0) -> types.SimpleNamespace:
    timer = types.SimpleNamespace(take=lambda: forward_seconds)
    return types.SimpleNamespace(skipped_steps=skipped_steps, forward_timer=timer)


def test_meter_gives_means_over_all_targets() -> None:
    meter = StepMeter({"flm": 0.5, "itm": 0.25}, Agreement(), torch.device("cpu"), "fp32")
    for loss, count in ((6.0, 2), (2.0, 2)):
        result = StepResult({"flm": torch.tensor(loss), "itm": torch.tensor(0.0)}, {"flm": count, "itm": 0}, 1e-3, 2.5)
        meter.add(result, [tiny_batch([1, 2, 3])], waited_seconds=0.0, flops=loss * 3e9)
    assert meter.is_finite()
    values = meter.read(engine(skipped_steps=1))
    assert values["flm_loss"] == 2.0 and values["loss"] == 1.0 and "itm_loss" not in values
    assert values["grad_norm"] == 2.5 and values["learning_rate"] == 1e-3 and values["skipped_steps"] == 1
    assert values["samples_per_second"] / values["predicted_tokens_per_second"] == pytest.approx(6 / 4)
    assert values["peak_memory_gib"] > 0.01 and "mfu" not in values
    assert values["gflop_per_sample"] == 3 * (6 + 2) / 6
    meter.add(StepResult({"flm": torch.tensor(float("nan"))}, {"flm": 1}, 1e-3, None), [], 0.0, 0.0)
    assert not meter.is_finite()
    assert "gflop_per_sample" not in meter.read(engine(skipped_steps=1))  # no samples, unknown cost


def two_ranks_cost(place) -> dict[str, float]:
    meter = StepMeter({"flm": 1.0}, Agreement(), torch.device("cpu"), "fp32")
    samples = [[1, 2, 3], [4]][place.rank]
    meter.add(StepResult({}, {}, 1e-3, None), [tiny_batch(samples)], 0.0, flops=[2e9, 6e9][place.rank])
    return meter.read(engine(skipped_steps=0))


def test_cost_per_sample_is_a_mean_over_all_ranks() -> None:
    assert [values["gflop_per_sample"] for values in run_ranks(2, two_ranks_cost)] == [2.0, 2.0]


def three_ranks_of_which_one_is_slow(place) -> dict[str, float]:
    meter = StepMeter({"flm": 1.0}, Agreement(), torch.device("cpu"), "fp32")
    for _ in range(2):
        meter.add(StepResult({}, {}, 1e-3, None), [tiny_batch([1])], [0.5, 0.25, 4.0][place.rank], 0.0)
    return meter.read(engine(0, forward_seconds=[6.0, 2.0, 4.0][place.rank]))


def test_the_slowest_rank_is_named_by_what_it_does_itself() -> None:
    """Seconds a step: waiting for its own data, and its own forward passes."""
    expected = {
        **{"data_wait_seconds": 0.5, "slowest_data_wait_seconds": 4.0, "slowest_data_wait_rank": 2},
        **{"forward_seconds": 2.0, "slowest_forward_seconds": 3.0, "slowest_forward_rank": 0},
    }
    for values in run_ranks(3, three_ranks_of_which_one_is_slow):
        assert {name: values[name] for name in expected} == expected


def test_unusable_samples_against_their_budget(tmp_path: Path) -> None:
    """Invariant 8."""
    data = DataConfig(bad_sample_budget=2, bad_sample_share=0.1)
    unusable = UnusableSamples(tmp_path, data, Agreement(), is_main=True, counts={"old": 1})
    unusable.add_total(unusable.note(4, [("a", "not an image"), ("b", "empty caption")]))
    assert not unusable.too_many(samples_seen=10)
    unusable.add_total(unusable.note(5, [("c", "not an image")]))
    assert unusable.too_many(samples_seen=10) and not unusable.too_many(samples_seen=20)
    unusable.name()
    assert unusable.counts == {"old": 1, "not an image": 2, "empty caption": 1}
    rows = [json.loads(line) for line in (tmp_path / "unusable.jsonl").read_text().splitlines()]
    assert {row["key"] for row in rows} == {"a", "b", "c"} and rows[-1]["step"] == 5
    assert "2 x not an image" in unusable.verdict() and "c (not an image)" in unusable.verdict()


def test_a_bad_shard_is_named_once_with_what_it_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Invariant 8: thousands of samples of one shard are one line, and a rewind takes back what it counted."""
    unusable = UnusableSamples(tmp_path, DataConfig(bad_sample_budget=0), Agreement(), is_main=True)
    for step in (1, 2):
        unusable.note(step, [(f"c/train/00001.tar#{row}", "missing shard") for row in range(50)])
        unusable.note(step, [(f"k{step}", "broken image"), ("c/train/00007.tar#3", "truncated shard")])
        unusable.name()
        if step == 1:
            counts, shards = dict(unusable.counts), copy.deepcopy(unusable.shards)
    assert unusable.shards == {
        "c/train/00001.tar": {"reason": "missing shard", "samples": 100, "since_step": 1},
        "c/train/00007.tar": {"reason": "truncated shard", "samples": 2, "since_step": 1},
    }
    assert json.loads((tmp_path / "unusable_shards.json").read_text()) == unusable.shards
    assert [json.loads(line)["key"] for line in (tmp_path / "unusable.jsonl").read_text().splitlines()] == ["k1", "k2"]
    assert capsys.readouterr().err.count("missing shard c/train/00001.tar, since step 1") == 1
    for words in ("100 x missing shard", "00001.tar (missing shard, 100 samples)", "k2 (broken image)"):
        assert words in unusable.verdict()

    unusable.return_to(1, counts, shards)
    assert unusable.counts == {"missing shard": 50, "broken image": 1, "truncated shard": 1}
    assert json.loads((tmp_path / "unusable_shards.json").read_text())["c/train/00001.tar"]["samples"] == 50
    assert (tmp_path / "unusable.jsonl").read_text().count("\n") == 1 and unusable.too_many(samples_seen=5199)
    assert not unusable.too_many(samples_seen=5200)
