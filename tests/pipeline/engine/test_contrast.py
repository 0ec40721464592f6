"""The contrastive term in the engine: means over the pairs of all ranks and micro-batches, at any ZeRO stage."""

from __future__ import annotations

import pytest
import torch

from model.batch import Batch, Row
from pipeline.config.options import Config
from pipeline.distributed.places import Place
from pipeline.engine.optim import learning_rate, parameter_groups, set_learning_rate
from tests.forked_ranks import run_ranks
from tests.pipeline.engine.test_engine import make_engine, micro_batches, tiny_config
from tests.tiny_flm import tiny_flm

WORLD, STEPS = 2, 3


def objective() -> torch.nn.Module:
    return tiny_flm(seed=3, spread=0.4, itc_weight=1.0, itc_width=8)


PLANNER = objective().planner


def batch_of(samples: list[int]) -> Batch:
    """One to three texts of each image, which follow from its number; some images of later samples are all alike."""
    pictures, rows = [], []
    for place, number in enumerate(samples):
        kind = 0 if number % 4 < 2 and number >= 8 else number  # 8, 9, 12, 13 ..
        pictures.append(torch.full((1, 3, 32, 32), kind * 29 % 250, dtype=torch.uint8))
        for text in range(1 + kind % 3):
            words = [3 + kind % 40, 50 + text, 3 + (kind * 7 + 1) % 40]
            rows.append(Row([0, *words, 2], place, seed=10 * number + text))
    return PLANNER(torch.stack(pictures), rows)


def losses_in_engine(place: Place, config: Config, stage: int) -> list[dict[str, float]]:
    engine, agreement = make_engine(place, config, stage, objective)
    found = []
    for step in range(STEPS):
        result = engine.step(step, micro_batches(config, place, step, batch_of))
        names = sorted(result.loss_sums)
        sums = agreement.total([float(result.loss_sums[name]) for name in names])
        found.append({name: total / max(result.counts[name], 1) for name, total in zip(names, sums, strict=True)})
    return found


def losses_in_turn(config: Config) -> list[dict[str, float]]:
    """The same without DeepSpeed and ranks: micro-batch after micro-batch in one process, with torch's AdamW."""
    torch.manual_seed(3)
    model = objective().train()
    groups = parameter_groups(model.named_parameters(), model.parameter_group, model.decays, config.optim)
    optimizer = torch.optim.AdamW(groups, betas=config.optim.betas, eps=config.optim.eps)
    found = []
    for step in range(STEPS):
        places = [Place(rank, WORLD, rank, "environment") for rank in range(WORLD)]
        batches = [one for place in places for one in micro_batches(config, place, step, batch_of)]
        counts = {name: sum(one.counts[name] for one in batches) for name in model.term_weights}
        sums = [model(one) for one in batches]
        means = {name: sum(one[name] for one in sums) / max(count, 1) for name, count in counts.items()}
        optimizer.zero_grad()
        sum(model.term_weights[name] * mean for name, mean in means.items()).backward()
        set_learning_rate(optimizer.param_groups, learning_rate(step, config.train.steps, config.optim))
        optimizer.step()
        found.append({name: mean.item() for name, mean in means.items()})
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), [(2, "bf16"), (3, "fp32")])
def test_it_is_the_mean_over_the_pairs_of_all_ranks(stage: int, precision: str) -> None:
    """2 ranks x 2 micro-batches of two images, with unequal numbers of pairs, and of one rank none."""
    expected = losses_in_turn(tiny_config(steps=STEPS))
    first, second = run_ranks(WORLD, losses_in_engine, tiny_config(steps=STEPS, precision=precision), stage)
    assert first == second
    for found, wanted in zip(first, expected, strict=True):
        assert found == pytest.approx(wanted, abs=1e-4 if precision == "fp32" else 0.15)
    counts = [batch_of([number, number + 1]).counts["itc"] for number in range(0, 16, 2)]
    assert len({*counts}) > 2 and 0 in counts
    assert abs(expected[0]["itc"] - expected[-1]["itc"]) > 0.01
