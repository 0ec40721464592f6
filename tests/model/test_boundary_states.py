"""What a query begins and ends with: the states beside its hidden span, taken one by one."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.batch import Row
from model.plans.both_ways import BothWaysPlanner
from model.plans.flm import FLMPlanner
from tests.tiny_flm import VOCABULARY, caption, images, pair_rows, tiny_flm


@pytest.mark.parametrize("depth", [(2, 2), (0, 1), (1, 2)])
def test_queries_begin_and_end_with_the_states_beside_their_span(depth: tuple[int, int]) -> None:
    objective = tiny_flm(corruption_rate=0.4, negative_share=1.0)
    net = objective.net
    for half, kept in zip((net.reconstructor_bottom, net.reconstructor_top), depth, strict=True):
        del half[: len(half) - kept]
    rows = [*pair_rows([caption(4, 1), caption(9, 2), caption(1, 3)]), Row(caption(3, 4), 1, 5, "negative")]
    plan = objective.planner(images(3), rows).plan

    def ends(boundary: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Queries and states in front of the first reader, and behind the last."""
        net.boundary_states, found = boundary, []
        readers = [*net.reconstructor_bottom, *net.reconstructor_top]
        hooks = [
            readers[0].register_forward_pre_hook(lambda _, given: found.append(given[:2])),
            readers[-1].register_forward_hook(lambda _, given, made: found.append((made, given[1]))),
        ]
        with torch.no_grad():
            found.append((net.fuse(plan, net.encode(images(3))).queries, found[-1][1]))
        for hook in hooks:
            hook.remove()
        return found

    plain, (begun, made, given_out) = ends(False), ends(True)
    assert torch.equal(plain[0][1], begun[1]) and torch.equal(plain[1][0], plain[2][0])
    num_positions = plan.text.shape[1]
    order = sorted(
        (cell // num_positions, stream, number, cell % num_positions)
        for stream, index in enumerate((plan.l2r_index, plan.r2l_index))
        for number, cell in enumerate(index.tolist())
    )
    place = {(row, stream, position): where for where, (row, stream, _, position) in enumerate(order)}
    for number, (cell, (lo, hi)) in enumerate(zip(plan.query_index.tolist(), plan.query_span.tolist(), strict=True)):
        row = cell // num_positions
        for (before, states), (after, _) in (((plain[0][0], begun[1]), begun), (made, given_out)):
            beside = states[place[row, 0, lo - 1]] + states[place[row, 1, hi + 1]]
            torch.testing.assert_close(after[number] - before[number], beside, rtol=0, atol=1e-5)


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    rate=st.sampled_from([0.0, 0.4, 1.0]),
    centred=st.booleans(),
    every_word=st.booleans(),
    roles=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_every_plan_computes_the_states_beside_its_spans(lengths, rate, centred, every_word, roles) -> None:
    rows = pair_rows([caption(count, count) for count in lengths])
    others = [
        Row(caption(count, 50 + count), number, 5, roles.draw(st.sampled_from(["negative", "read"])))
        for number, count in enumerate(lengths)
    ]
    planners = [FLMPlanner(VOCABULARY, rate, 0.5, centred=centred, query_rate=0.6, every_word=every_word)]
    planners += [BothWaysPlanner(VOCABULARY, read, ("flm",), rate, centred) for read in (1, 2)]
    for planner in planners:
        plan = planner(images(len(lengths)), [*rows, *others]).plan
        l2r, r2l = set(plan.l2r_index.tolist()), set(plan.r2l_index.tolist())
        width = plan.text.shape[1]
        for cell, (lo, hi) in zip(plan.query_index.tolist(), plan.query_span.tolist(), strict=True):
            row_start = cell // width * width
            assert row_start + lo - 1 in l2r and row_start + hi + 1 in r2l


def test_a_plan_that_lacks_one_is_an_error_and_not_another_state() -> None:
    objective = tiny_flm()
    objective.net.boundary_states = True
    plan = objective.planner(images(1), pair_rows([caption(5, 1)])).plan
    lacking = dataclasses.replace(plan, r2l_index=plan.r2l_index[:-1])
    with torch.no_grad(), pytest.raises((IndexError, RuntimeError), match="out of range"):
        objective.net.fuse(lacking, objective.net.encode(images(1)))
