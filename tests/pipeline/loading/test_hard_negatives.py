"""Hard negatives through the loader: what they cost and what they depend on."""

from __future__ import annotations

import pytest

from model.plans.flm import FLMPlanner
from model.plans.hard_negatives import HardNegatives
from pipeline.config.options import Config, ConfigError, validate
from pipeline.config.task_options import task_options
from pipeline.data.shard_reader import Corpus
from tests.pipeline.loading.loader_data import rows_by_sample, same


def test_hard_negatives_come_from_the_micro_batch_and_from_no_further_read(data, monkeypatch) -> None:
    """Whatever the number of ranks, as long as the micro-batch stays; never from the own image's other caption."""
    planner = HardNegatives(FLMPlanner(data.tokenizer.vocabulary, 0.3, negative_share=0.0), share=0.5)
    monkeypatch.setattr(Corpus, "read_text", lambda corpus, index: pytest.fail("a caption was read for a negative"))
    whole = list(data.train(planner=planner, accumulation=4))
    parts = [list(data.train(planner=planner, world=2, rank=rank, accumulation=2)) for rank in (0, 1)]
    together = [batch for pair in zip(*parts, strict=True) for batch in pair]
    assert len(whole) == 12 and all(map(same, whole, together))
    found = 0
    for batch in whole:
        own = {rows[0]: key for key, _, rows in rows_by_sample([batch])}
        for key, _, rows in rows_by_sample([batch]):
            assert len(rows) <= 2 and (len(rows) == 1 or own[rows[1]] != key)
            found += len(rows) - 1
    assert found > 12
    other = list(data.train(planner=planner, accumulation=2, micro_batch=8))
    pairs = [[(key, image, rows[0]) for key, image, rows in rows_by_sample(one)] for one in (whole, other)]
    assert pairs[0] == pairs[1] and rows_by_sample(whole) != rows_by_sample(other)


@pytest.mark.parametrize("option", ["objective.negatives in_batch_hard", "task.negatives in_batch"])
def test_a_micro_batch_of_one_is_refused(option: str) -> None:
    config = Config(task=task_options("retrieval" if "task" in option else "pretraining"))
    section, negatives = option.split(".negatives ")
    getattr(config, section).negatives, config.optim.micro_batch_size = negatives, 1
    with pytest.raises(ConfigError, match=f"{option} finds no other caption.*use 2 or more, or --{section}.negatives"):
        validate(config)
    config.optim.micro_batch_size = 2
    validate(config)
