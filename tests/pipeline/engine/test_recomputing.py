"""Activation checkpointing inside DeepSpeed: the same run at every ZeRO stage, also where weights are divided."""

from __future__ import annotations

import pytest
from torch import nn

from tests.forked_ranks import run_ranks
from tests.pipeline.engine.test_engine import global_loss, make_engine, micro_batches, tiny_config
from tests.tiny_flm import flm_batch, tiny_flm

STEPS = 3


def losses_of_run(place, stage: int, recompute: bool) -> list[float]:
    def objective() -> nn.Module:
        built = tiny_flm(seed=3, spread=0.4, corruption_rate=0.4)
        built.net.recompute = built.net.vision.recompute = recompute
        return built

    config = tiny_config()
    engine, agreement = make_engine(place, config, stage, objective)
    results = (engine.step(step, micro_batches(config, place, step, flm_batch)) for step in range(STEPS))
    return [global_loss(engine, agreement, result) for result in results]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_recomputing_trains_alike_at_every_stage(stage: int) -> None:
    plain, again = (run_ranks(2, losses_of_run, stage, recompute) for recompute in (False, True))
    assert again == plain and plain[0][-1] < plain[0][0]
