"""The rehearsal of a resume says what a resume does: of small models, compared with counted calls."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.proof.resume_rehearsal import CELLS, held, rehearse, table
from pipeline.checkpoint.files import KINDS
from pipeline.engine.optim import parameter_groups
from tests.forked_ranks import run_ranks
from tests.pipeline.checkpoint.test_reading import load_at_every_stage, save
from tests.pipeline.engine.test_engine import tiny_config
from tests.tiny_objective import TinyObjective

SHAPES = {"embedding": (31, 12), "weight": (7, 12), "bias": (7,), "one": (1,)}
GROUPS = [["embedding", "weight"], ["bias", "one"]]


@pytest.mark.parametrize("ranks", [1, 2, 3, 16])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_ranks_hold_each_element_once(ranks: int, stage: int) -> None:
    for name, shape in SHAPES.items():
        parts = [held(SHAPES, GROUPS, stage, ranks, rank).get(name, (0, 0)) for rank in range(ranks)]
        assert sorted(i for part in parts for i in range(*part)) == list(range(math.prod(shape))), name


@pytest.mark.parametrize("cell", CELLS)
def test_a_resume_reads_a_checkpoint_once(cell: tuple[int, int]) -> None:
    cost = rehearse(SHAPES, GROUPS, 8, *cell)
    assert cost.read_gb_all == pytest.approx(cost.checkpoint_gb) and cost.files <= 3 * 8
    assert cost.checkpoint_gb <= cost.hashed_gb_all
    if cell[0] == cell[1]:
        assert cost.opened_rank == 3 and cost.hashed_files_rank <= 3 and cost.header_files_rank <= 3
    assert len(table([cost]).splitlines()) == 3


@pytest.mark.slow
@pytest.mark.parametrize("written_at", [2, 3])
def test_it_is_what_two_ranks_do(tmp_path: Path, written_at: int) -> None:
    """Bytes of each rank and files it opens, at every stage, but for the buffer that the model has besides."""
    config = tiny_config()
    objective = TinyObjective()
    names = {parameter: name for name, parameter in objective.named_parameters()}
    shapes = {name: tuple(parameter.shape) for parameter, name in names.items()}
    groups = parameter_groups(objective.named_parameters(), objective.parameter_group, objective.decays, config.optim)
    groups = [[names[parameter] for parameter in group["params"]] for group in groups]
    run_ranks(2, save, config, written_at, tmp_path)
    buffer = objective.offset.nbytes
    for rank, found in enumerate(run_ranks(2, load_at_every_stage, config, tmp_path, (1, 2, 3))):
        for stage, (num_bytes, *_) in found.items():
            parts = held(shapes, groups, stage, 2, rank)
            expected = 4 * len(KINDS) * sum(end - begin for begin, end in parts.values())
            assert num_bytes - expected in (0, buffer), (stage, rank)
