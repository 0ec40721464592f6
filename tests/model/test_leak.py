"""Perturbation tests: no output moves when the token it predicts, or a token in its hidden span, is replaced."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from model.batch import Batch, Row
from tests.rounding import rounding
from tests.tiny_flm import MAX_TEXT_LENGTH, caption, images, pair_rows, tiny_flm, with_text

ROUNDING = 1e-11  # float64, outputs of order 1 after the last LayerNorm; an honest dependence moves them far more
OF_LOSSES = rounding(61)  # losses are computed in fp32 from logits of 61 words


def features(objective, batch: Batch) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        result = objective.net(batch)
    return {"flm": result.queries, "l2r": result.l2r, "r2l": result.r2l}


def moved(objective, batch: Batch, row: int, position: int, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """How far each feature moves when one token of the text is replaced by another word, the plan kept as it is."""
    text = batch.plan.text.clone()
    text[row, position] = 3 + (text[row, position] + 17) % 50
    changed = features(objective, with_text(batch, text))
    return {name: (changed[name] - base[name]).abs().amax(1) for name in base}


@pytest.mark.parametrize("boundary", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("num_words", [1, 2, 3, 5, 9, 16])
def test_default_behaviour_never_leaks(num_words: int, rate: float, boundary: bool):
    """Invariant 3, in a batch with a longer and a shorter row so that padding is in play.

    Every feature that predicts something must stand still when a token it may not know changes, and must move when a
    token it may know changes (otherwise the test could not fail).
    """
    objective = tiny_flm(corruption_rate=rate).double()
    objective.net.boundary_states = boundary
    rows = pair_rows([caption(num_words, 1), caption(num_words + 3, 2), caption(1, 3)])
    batch = objective.planner(images(3), rows)
    base = features(objective, batch)
    length = batch.plan.text.shape[1]
    span_of_query = {
        int(cell): span.tolist() for cell, span in zip(batch.plan.query_index, batch.plan.query_span, strict=True)
    }
    cells = {
        "flm": batch.plan.query_index.tolist(),
        "l2r": batch.plan.l2r_index.tolist(),
        "r2l": batch.plan.r2l_index.tolist(),
    }
    for position in range(1, num_words + 1):
        shift = moved(objective, batch, 0, position, base)
        for name, term in batch.terms.items():
            for feature in term.position.tolist() if name != "itm" else []:
                cell = cells[name][feature]
                row, i = divmod(cell, length)
                lo, hi = span_of_query[cell] if name == "flm" else (i + 1, length) if name == "l2r" else (-1, i - 1)
                known = row == 0 and not lo <= position <= hi
                assert (shift[name][feature] > ROUNDING).item() == known, (name, row, i, position, lo, hi)


@pytest.mark.parametrize("num_words", [1, 2, 4, 8, 14, MAX_TEXT_LENGTH - 2])
@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_released_behaviour_leaks_only_where_parity_needs_it(num_words: int, rate: float):
    """Invariant 3: all but the two quirks of section 5.4, `</s>` from its own query and from the first pad."""
    objective = tiny_flm("released", corruption_rate=rate).double()
    rows = pair_rows([caption(num_words, 1), caption(3, 2)])
    batch = objective.planner(images(2), rows)
    base = features(objective, batch)
    length = batch.plan.text.shape[1]
    span_of_query = {
        int(cell): span.tolist() for cell, span in zip(batch.plan.query_index, batch.plan.query_span, strict=True)
    }
    for position in range(1, num_words + 1):
        shift = moved(objective, batch, 0, position, base)
        for feature in batch.terms["flm"].position.tolist():
            cell = int(batch.plan.query_index[feature])
            lo, hi = span_of_query[cell]
            known = cell < length and not lo <= position <= hi
            assert (shift["flm"][feature] > ROUNDING).item() == known
        for feature in batch.terms["l2r"].position.tolist():
            cell = int(batch.plan.l2r_index[feature])
            assert (shift["l2r"][feature] > ROUNDING).item() == (cell < length and position <= cell)
        for feature in batch.terms["r2l"].position.tolist():
            cell = int(batch.plan.r2l_index[feature])
            if cell != num_words + 2:  # the first pad of row 0 sees the whole sentence
                assert (shift["r2l"][feature] > ROUNDING).item() == (cell < length and position >= cell)


def losses_by_row(objective, rows: list[Row], pictures: torch.Tensor) -> dict[tuple[str, int], float]:
    """Sum of losses of every (term, row of ``rows``), computed in one batch."""
    batch = objective.planner(pictures, rows)
    with torch.no_grad():
        losses = objective._losses(batch)
    cells = {
        "flm": batch.plan.query_index,
        "itm": batch.plan.query_index,
        "l2r": batch.plan.l2r_index,
        "r2l": batch.plan.r2l_index,
    }
    sums: dict[tuple[str, int], float] = {}
    for name, term in batch.terms.items():
        row = cells[name][term.position] // batch.plan.text.shape[1]
        for number in range(len(rows)):
            sums[name, number] = losses[name][0][row == number].double().sum().item()
    return sums


@pytest.mark.parametrize("behaviour", ["default", "released"])
def test_padding_and_batch_composition_change_nothing(behaviour: str):
    """Invariant 5: a sample alone equals the same sample among longer, shorter and negative rows."""
    objective = tiny_flm(behaviour, corruption_rate=0.4, negative_share=1.0).double()
    captions = [caption(4, 1), caption(15, 2), caption(1, 3), caption(9, 4)]
    rows, pictures = pair_rows(captions), images(4)
    if behaviour == "default":
        rows += [Row(caption(6, 9), 2, seed=5, role="negative")]
    together = losses_by_row(objective, rows, pictures)
    for number, row in enumerate(rows[:4]):
        own = [row, *(extra for extra in rows[4:] if extra.image == number)]
        alone = losses_by_row(
            objective, [dataclasses.replace(each, image=0) for each in own], pictures[number : number + 1]
        )
        for (name, index), value in alone.items():
            original = number if index == 0 else 4
            assert value == pytest.approx(together[name, original], rel=OF_LOSSES, abs=OF_LOSSES), (
                name,
                number,
            )


def test_a_placeholder_row_changes_nothing_for_others():
    objective = tiny_flm(corruption_rate=0.4).double()
    rows, pictures = pair_rows([caption(4, 1), caption(7, 2)]), images(3)
    without = losses_by_row(objective, rows, pictures[:2])
    with_placeholder = losses_by_row(objective, [*rows, Row([0, 2], 2, 0, "placeholder")], pictures)
    for key, value in without.items():
        assert value == pytest.approx(with_placeholder[key], rel=OF_LOSSES, abs=OF_LOSSES)
    assert all(value == 0 for (_, row), value in with_placeholder.items() if row == 2)


def test_a_caption_that_is_not_reconstructed_keeps_its_forward_loss_and_changes_nothing_for_others():
    whole, part = (tiny_flm(corruption_rate=0.4, reconstruction_share=share).double() for share in (1.0, 0.5))
    rows, pictures = pair_rows([caption(4, 1), caption(7, 2), caption(5, 3), caption(1, 4)]), images(4)
    expected, found = losses_by_row(whole, rows, pictures), losses_by_row(part, rows, pictures)
    left_out = {row for row in range(len(rows)) if found["flm", row] == 0}
    assert 0 < len(left_out) < len(rows)
    for (name, row), value in found.items():
        gone = row in left_out and name in ("flm", "r2l")
        assert value == (0 if gone else pytest.approx(expected[name, row], rel=OF_LOSSES, abs=OF_LOSSES))

    alone = part.float().planner(pictures, [dataclasses.replace(rows[row], image=0) for row in left_out])
    losses = part(alone)
    assert alone.counts["flm"] == 0 and alone.counts["l2r"] > 0
    sum(losses.values()).backward()
    assert all(torch.isfinite(value) for value in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in part.parameters() if p.grad is not None)
