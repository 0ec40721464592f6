"""MLM, AR and PrefixLM: the release's numbers, exact rates, no leaks, and what they share with FLM."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.batch import Batch, Row
from model.build import build_objective
from model.config import ModelConfig, TextConfig, VisionConfig, Vocabulary, objective_options
from model.plans.builder import PlanBuilder
from model.plans.mlm import MLMPlanner
from model.weights.released import RULES_OF, import_released
from model.weights.start import foreign_names
from tests.released_fixture import released_fixture
from tests.rounding import RELEASED
from tests.tiny_flm import MAX_TEXT_LENGTH, VOCABULARY, caption, images, pair_rows, tiny_config, tiny_flm, with_text

ROUNDING = 1e-11  # float64


def released(name: str) -> torch.nn.Module:
    config = ModelConfig(
        behaviour="released",
        vision=VisionConfig(name=None, image_size=96, patch_size=32, width=128, layers=4),
        text=TextConfig(width=64, heads=4, ffn_width=256, bottom_layers=3, top_layers=3, max_positions=66),
    )
    vocabulary = Vocabulary(size=292, bos_id=0, pad_id=1, eos_id=2, mask_id=291)
    return build_objective(config, objective_options(name), vocabulary, 16).eval()


def dumped_batch(objective: torch.nn.Module, name: str, dump: dict[str, Tensor], inputs: dict[str, Tensor]) -> Batch:
    """The dumped input: AR's by its own planner, MLM's with the masks that the dump drew."""
    lengths, labels = inputs["lengths"].tolist(), dump["labels"]
    ids = dump["ids"] if name == "mlm" else inputs["text_ids"]
    rows = [Row(row[:n].tolist(), number, number) for number, (row, n) in enumerate(zip(ids, lengths, strict=True))]
    pictures = torch.zeros(len(rows), 1, 3, 96, 96, dtype=torch.uint8)
    if name == "ar":
        batch = objective.planner(pictures, rows)
    else:
        builder = PlanBuilder(16, {"mlm": ("l2r", "token")})
        for number, n in enumerate(lengths):
            states = builder.add_states("l2r", number, np.arange(n))
            targets = np.flatnonzero(labels[number].numpy() != -100)
            builder.add_targets("mlm", states[targets], labels[number].numpy()[targets])
        batch = builder.build(pictures, rows, objective.net.vocabulary, lengths)
    batch.images = inputs["image"][:, None]  # the dump holds normalised pixels
    return batch


@pytest.mark.parametrize("name", ["mlm", "ar"])
def test_the_release_is_reproduced(name: str) -> None:
    """Every layer, logit, the loss and gradient norms up to rounding; every key of the state dict is known."""
    dump, state, norms = released_fixture(name)
    inputs, _, _ = released_fixture("flm")
    objective = released(name)
    report = import_released(objective, state)
    known = len(report.aliased) + len(report.dead) + len({key for keys in report.used.values() for key in keys})
    assert known == len(state)
    batch = dumped_batch(objective, name, dump, inputs)
    outputs: dict[str, Tensor] = {}
    for half in ("bottom", "top"):
        for number, layer in enumerate(getattr(objective.net, half)):
            layer.register_forward_hook(lambda _, __, output, key=f"{half}{number}": outputs.update({key: output}))
    states = objective.net(batch).l2r
    # The extract holds the real tokens row after row, as the states stand; AR computes none for `</s>`.
    real = torch.isin(cells_of_real_tokens(inputs["lengths"]), batch.plan.l2r_index)
    assert real.sum() == len(batch.plan.l2r_index) and len(outputs) == 6
    for key, ours in outputs.items():
        torch.testing.assert_close(ours, dump[f"layers.{key}"][real], rtol=0, atol=RELEASED)
    logits = objective.lm_head.logits(states[batch.terms[name].position])
    torch.testing.assert_close(logits, dump["logits"], rtol=RELEASED, atol=RELEASED)
    loss = objective(batch)[name] / batch.counts[name]
    assert loss.item() == pytest.approx(dump["loss"].item(), abs=RELEASED)
    loss.backward()
    compared = 0
    for ours_name, parameter in objective.named_parameters():
        parts = foreign_names(ours_name, RULES_OF[name])
        if parameter.grad is None or any(part not in norms for part in parts):
            continue
        noise = RELEASED * parameter.grad.norm().item()  # what keys' biases have: their gradient is 0
        for part, gradient in zip(parts, parameter.grad.chunk(len(parts)), strict=True):
            assert gradient.norm().item() == pytest.approx(norms[part], rel=2 * RELEASED, abs=noise), part
            compared += 1
    assert compared > 150


def cells_of_real_tokens(lengths: Tensor) -> Tensor:
    return torch.cat([row * 16 + torch.arange(n) for row, n in enumerate(lengths.tolist())])


def with_weights_of(target: torch.nn.Module, source: torch.nn.Module) -> torch.nn.Module:
    missing, _ = target.load_state_dict(source.state_dict(), strict=False)
    assert missing == []
    return target


def test_ar_is_the_l2r_loss_of_flm_bit_for_bit() -> None:
    flm = tiny_flm(corruption_rate=0.4)
    ar = with_weights_of(tiny_flm(name="ar", seed=1), flm)
    rows, pictures = pair_rows([caption(k, k) for k in (5, 1, 9, 3)]), images(4)
    losses = []
    for objective, name in ((flm, "l2r"), (ar, "ar")):
        batch = objective.planner(pictures, rows)
        losses.append(objective._losses(batch)[name][0])
    assert torch.equal(*losses)


def test_prefixlm_without_a_prefix_is_ar() -> None:
    ar = tiny_flm(name="ar")
    prefixlm = with_weights_of(tiny_flm(name="prefixlm", prefix_share=0.0, seed=1), ar)
    rows, pictures = pair_rows([caption(k, k) for k in (5, 1, 9)]), images(3)
    losses = [objective(objective.planner(pictures, rows)) for objective in (ar, prefixlm)]
    assert torch.equal(losses[0]["ar"], losses[1]["prefixlm"])


def known_before(batch: Batch, row: int, state: int) -> range:
    """Positions that the prediction made from a state may know: the prefix, and everything up to the state."""
    return range(max(state + 1, int(batch.plan.prefix[row])))


@pytest.mark.parametrize("num_words", [1, 2, 3, 7, 15])
@pytest.mark.parametrize("options", [dict(name="ar"), dict(name="prefixlm"), dict(name="prefixlm", prefix_share=0.6)])
def test_a_prediction_depends_on_what_precedes_it_and_on_nothing_else(num_words: int, options: dict) -> None:
    """Invariant 3, beside a longer and a shorter row."""
    objective = tiny_flm(**options).double()
    rows = pair_rows([caption(num_words, 1), caption(num_words + 3, 2), caption(1, 3)])
    batch = objective.planner(images(3), rows)
    term, width = batch.terms[options["name"]], batch.plan.text.shape[1]
    with torch.no_grad():
        base = objective.net(batch).l2r
        for position in range(1, num_words + 1):
            text = batch.plan.text.clone()
            text[0, position] = 3 + (text[0, position] + 17) % 50
            shift = (objective.net(with_text(batch, text)).l2r - base).abs().amax(1)
            for feature in term.position.tolist():
                row, state = divmod(int(batch.plan.l2r_index[feature]), width)
                known = row == 0 and position in known_before(batch, row, state)
                assert (shift[feature] > ROUNDING).item() == known, (row, state, position)
    for feature, label in zip(term.position.tolist(), term.target.tolist(), strict=True):
        row, state = divmod(int(batch.plan.l2r_index[feature]), width)
        assert label == rows[row].token_ids[state + 1] and state + 1 not in known_before(batch, row, state)


@pytest.mark.parametrize("num_words", [1, 2, 6, 15])
def test_mlm_knows_nothing_of_what_it_hides(num_words: int) -> None:
    """Invariant 3: the input holds no trace of a word under `<mask>`, and every visible token is read."""
    objective = tiny_flm(name="mlm", mask_rate=0.4).double()
    row = Row(caption(num_words, 1), 0, seed=4)
    other = dataclasses.replace(row, token_ids=[0, *((token + 11) % 50 + 3 for token in row.token_ids[1:-1]), 2])
    batch, changed = (objective.planner(images(1), [each]) for each in (row, other))
    masked = batch.plan.text[0] == VOCABULARY.mask_id
    assert torch.equal(masked, changed.plan.text[0] == VOCABULARY.mask_id)
    with torch.no_grad():
        base = objective.net(batch).l2r
        kept = torch.where(masked, changed.plan.text[0], batch.plan.text[0])
        hidden_words_changed = with_text(batch, kept[None])
        assert torch.equal(objective.net(hidden_words_changed).l2r, base)
        for position in range(num_words + 2):
            text = batch.plan.text.clone()
            text[0, position] = 3 + (text[0, position] + 17) % 50
            moved = (objective.net(with_text(batch, text)).l2r - base).abs().amax(1)
            assert (moved > ROUNDING).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.sampled_from([0.15, 0.3, 0.4, 0.75, 1.0]), st.integers(0, 2**63))
def test_every_caption_has_an_exact_number_of_targets(num_words: int, rate: float, seed: int) -> None:
    planner = MLMPlanner(VOCABULARY, rate, None, False, 0.0)
    ids = caption(num_words)
    batch = planner(images(1), [Row(ids, 0, seed)])
    targets = batch.plan.l2r_index[batch.terms["mlm"].position].tolist()
    assert max(1, math.floor(rate * num_words)) <= len(targets) <= max(1, math.ceil(rate * num_words))
    assert len(set(targets)) == len(targets) and all(1 <= target <= num_words for target in targets)
    assert [ids[target] for target in targets] == batch.terms["mlm"].target.tolist()
    untouched = [position for position in range(num_words + 2) if position not in targets]
    assert [int(batch.plan.text[0, position]) for position in untouched] == [ids[position] for position in untouched]


@pytest.mark.slow
def test_mask_rates_and_replacements_are_nominal() -> None:
    """The share of hidden words at every position, and 80/10/10, within 5 standard errors."""
    planner, num_words, draws = MLMPlanner(VOCABULARY, 0.3, None, False, 0.0), 9, 3000
    ids = caption(num_words)
    hidden, kinds = Counter(), Counter()
    for seed in range(draws):
        batch = planner(images(1), [Row(ids, 0, seed * 7919)])
        for target in batch.plan.l2r_index[batch.terms["mlm"].position].tolist():
            found = int(batch.plan.text[0, target])
            hidden[target] += 1
            kinds["mask" if found == VOCABULARY.mask_id else "kept" if found == ids[target] else "random"] += 1
    for position in range(1, num_words + 1):
        assert hidden[position] / draws == pytest.approx(0.3, abs=5 * math.sqrt(0.3 * 0.7 / draws))
    total = sum(kinds.values())
    assert kinds["mask"] / total == pytest.approx(0.8, abs=5 * math.sqrt(0.16 / total))
    same_word = 0.1 * (1 + 4) / VOCABULARY.size  # a random word may be the own one; special tokens are not drawn
    assert kinds["random"] / total == pytest.approx(0.1 - same_word, abs=5 * math.sqrt(0.09 / total))


@pytest.mark.parametrize(("mask_rate", "prediction_rate"), [(0.5, 0.25), (0.25, 1.0), (0.5, 0.8), (0.3, 0.3)])
def test_prediction_rate_varies_at_fixed_corruption(mask_rate: float, prediction_rate: float) -> None:
    """Below the mask rate a part of the hidden words is predicted; above it the caption is masked several times."""
    planner = MLMPlanner(VOCABULARY, mask_rate, prediction_rate, False, 0.0)
    num_words = 12
    ids = caption(num_words)
    rows = [Row(ids, 0, 3), Row(caption(4, 5), 1, 4)]
    batch = planner(images(2), rows)
    width = batch.plan.text.shape[1]
    cells = batch.plan.l2r_index[batch.terms["mlm"].position]
    labels = batch.terms["mlm"].target.tolist()
    own = [divmod(cell, width) for cell in cells.tolist() if batch.plan.image_of_row[cell // width] == 0]
    positions = [position for _, position in own]
    assert len(positions) == len(set(positions)) == pytest.approx(prediction_rate * num_words, abs=1)
    for cell, label in zip(cells.tolist(), labels, strict=True):
        assert label == rows[batch.plan.image_of_row[cell // width]].token_ids[cell % width]
    own_rows = sorted({row for row, _ in own})
    assert len(own_rows) == math.ceil(round(prediction_rate / mask_rate, 6))
    for row in own_rows:
        changed = sum(int(batch.plan.text[row, position]) != ids[position] for position in range(1, num_words + 1))
        assert changed <= math.ceil(mask_rate * num_words)
        assert batch.plan.image_of_row[row] == 0 and batch.plan.prefix[row] == num_words + 2


def test_whole_words_are_hidden_together() -> None:
    starts = bytes(1 if token % 3 == 0 else 0 for token in range(VOCABULARY.size))
    vocabulary = dataclasses.replace(VOCABULARY, word_starts=starts)
    planner = MLMPlanner(vocabulary, 0.4, None, True, 0.0)
    ids = [0, 3, 4, 5, 6, 9, 10, 12, 13, 14, 15, 2]  # words 3-5, 6, 9-10, 12-14, 15
    words = [{1, 2, 3}, {4}, {5, 6}, {7, 8, 9}, {10}]
    sizes = []
    for seed in range(200):
        batch = planner(images(1), [Row(ids, 0, seed)])
        targets = set(batch.plan.l2r_index[batch.terms["mlm"].position].tolist())
        assert all(word <= targets or not word & targets for word in words)
        sizes.append(len(targets))
    assert np.mean(sizes) == pytest.approx(4, abs=0.5)
    with pytest.raises(ValueError, match="objective.whole_words needs a tokenizer"):
        build_objective(tiny_config(), objective_options("mlm", whole_words=True), VOCABULARY, MAX_TEXT_LENGTH)


@pytest.mark.parametrize("name", ["mlm", "ar", "prefixlm"])
def test_padding_and_batch_composition_change_nothing(name: str) -> None:
    """Invariant 5, negatives included."""
    objective = tiny_flm(name=name)
    captions, pictures = [caption(4, 1), caption(15, 2), caption(1, 3)], images(3)
    rows = [*pair_rows(captions), Row(caption(6, 9), 2, seed=5, role="negative")]
    together = objective(objective.planner(pictures, rows))
    summed = dict.fromkeys(together, 0.0)
    for number in range(3):
        own = [dataclasses.replace(row, image=0) for row in rows if row.image == number]
        alone = objective(objective.planner(pictures[number : number + 1], own))
        for term, value in alone.items():
            summed[term] += value.item()
    assert summed["itm"] > 0
    for term, value in together.items():
        assert summed[term] == pytest.approx(value.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["mlm", "ar", "prefixlm"])
def test_the_cls_feature_reads_the_whole_caption_and_the_image(name: str) -> None:
    objective = tiny_flm(name=name).double()
    rows = [*pair_rows([caption(5, 1)]), Row(caption(6, 9), 0, seed=5, role="negative")]
    batch = objective.planner(images(1), rows)
    assert batch.terms["itm"].target.tolist() == [1, 0]
    cls = batch.terms["itm"].position
    with torch.no_grad():
        base = objective.net(batch).l2r[cls]
        for position in range(1, 6):
            text = batch.plan.text.clone()
            text[0, position] = 3 + (text[0, position] + 17) % 50
            assert ((objective.net(with_text(batch, text)).l2r[cls] - base).abs().amax(1) > 0)[0]
        other = dataclasses.replace(batch, images=images(1, seed=8))
        assert ((objective.net(other).l2r[cls] - base).abs().amax(1) > ROUNDING).all()


@pytest.mark.parametrize("name", ["mlm", "ar", "prefixlm"])
def test_unusable_samples_and_empty_captions_have_no_targets(name: str) -> None:
    objective = tiny_flm(name=name)
    batch = objective.planner(images(2), [Row([0, 2], 0, 0, "placeholder"), Row([0, 9, 2], 1, 1)])
    losses = objective(batch)
    assert batch.counts[name] == (1 if name == "mlm" else 2)  # AR predicts </s> too
    assert all(torch.isfinite(value) for value in losses.values())


@pytest.mark.parametrize("rate", [0.15, 1.0])
@pytest.mark.parametrize(("name", "targets"), [("flm", 1), ("mlm", 1), ("ar", 2), ("prefixlm", 2)])
def test_captions_of_one_token_are_learnt_from(name: str, targets: int, rate: float) -> None:
    """Alone and beside each other as pair and negative: the word is a target, losses and gradients are finite."""
    options = {"flm": {"corruption_rate": rate}, "mlm": {"mask_rate": rate}, "prefixlm": {"prefix_share": rate - 0.01}}
    objective = tiny_flm(name=name, negative_share=1.0, negatives="in_batch_hard", **options.get(name, {}))
    for rows in (pair_rows([[0, 9, 2]]), pair_rows([[0, 9, 2], [0, 11, 2]])):
        batch = objective.planner(images(len(rows)), rows)
        assert batch.counts[name] == targets * len(rows)
        assert {*batch.terms[name].target.tolist()} - {2} == {row.token_ids[1] for row in rows}
        loss = sum(objective(batch).values())
        gradients = torch.autograd.grad(loss, [objective.lm_head.weight, objective.net.embedding.word.weight])
        assert torch.isfinite(loss) and all(torch.isfinite(one).all() and one.any() for one in gradients)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(name="mlm", mask_rate=0.0), "objective.mask_rate is 0.0, expected above 0"),
        (dict(name="mlm", mask_rate=1.5), "objective.mask_rate is 1.5"),
        (dict(name="mlm", prediction_rate=0.0), "objective.prediction_rate is 0.0"),
        (dict(name="prefixlm", prefix_share=1.0), "objective.prefix_share is 1.0"),
        (dict(corruption_rate=-0.1), "objective.corruption_rate is -0.1"),
        (dict(query_rate=0.0), "objective.query_rate is 0.0, expected above 0"),
        (dict(stream_rate=1.5), "objective.stream_rate is 1.5, expected above 0 and at most 1"),
        (dict(reconstruction_share=0.0), "objective.reconstruction_share is 0.0, expected above 0 and at most 1"),
        (
            dict(reconstruction_share=0.5, l2r_weight=0.0),
            "objective.l2r_weight is 0.0, expected above 0 with objective.reconstruction_share below 1",
        ),
    ],
)
def test_rates_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_objective(tiny_config(), objective_options(**options), VOCABULARY, MAX_TEXT_LENGTH)


def test_what_has_no_released_behaviour_is_refused() -> None:
    with pytest.raises(ValueError, match="prefixlm has no released behaviour"):
        tiny_flm("released", name="prefixlm")
    with pytest.raises(ValueError, match="query_rate below 1 has no released behaviour"):
        tiny_flm("released", query_rate=0.5)


def test_a_longer_prefix_than_the_caption_leaves_one_word_to_predict() -> None:
    objective = tiny_flm(name="prefixlm", prefix_share=0.99)
    batch = objective.planner(images(3), pair_rows([caption(1), caption(2), caption(10)]))
    assert batch.plan.prefix.tolist() == [0, 2, 10]
    assert batch.counts["prefixlm"] == 2 + 2 + 2  # the last word and </s>


@pytest.mark.parametrize("name", ["flm", "mlm", "ar"])
def test_released_behaviour_trains_without_matching(name: str) -> None:
    """It has no head for image-text matching, so no caption is read as a negative and nothing is predicted from one."""
    objective = tiny_flm("released", name=name).train()
    batch = objective.planner(images(2), pair_rows([caption(9, 1), caption(12, 2)]))
    assert objective.planner.negative_share == 0 and "itm" not in batch.terms
    losses = objective(batch)
    assert set(losses) == set(objective.term_weights) and all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
