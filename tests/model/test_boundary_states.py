"""What a query begins and ends with: the states beside its hidden span, taken one by one."""

import pytest
import torch

from model.batch import Row
from tests.tiny_flm import caption, images, pair_rows, tiny_flm


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
