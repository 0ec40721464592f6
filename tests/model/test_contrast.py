"""The contrastive term of pretraining against loops over single pairs, and what it must not change."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.batch import Batch, Row
from model.build import build_objective
from model.config import objective_options
from pipeline.config.options import Config, ConfigError, validate
from tests.model.plans.test_contrast import are_wrong
from tests.model.test_features import stream_states
from tests.rounding import DOUBLE, TINY
from tests.tiny_flm import MAX_TEXT_LENGTH, VOCABULARY, caption, images, pair_rows, tiny_config, tiny_flm

OBJECTIVES = ["flm", "mlm", "ar", "prefixlm"]
ON = {"itc_weight": 0.5, "itc_width": 8}
ROWS = [
    Row(caption(4, 1), 0, 11, "pair", "a"),
    Row(caption(9, 2), 0, 12, "pair", "a"),
    Row(caption(2, 3), 1, 13, "pair", "b"),
    Row(caption(1, 4), 1, 14, "pair", "b"),
    Row(caption(4, 1), 1, 15, "pair", "b"),  # what image 0 says too
    Row(caption(6, 5), 2, 16, "pair", "c"),
    Row(caption(3, 6), 3, 17, "pair", "c"),  # another picture of the same sample
    Row([0, 2], 4, 0, "placeholder", "d"),
    Row(caption(5, 7), 5, 19, "pair", "e"),
    Row(caption(5, 8), 1, 20, "read"),
    Row(caption(7, 9), 0, 21, "negative"),
]


def pooled_alone(objective: nn.Module, batch: Batch, number: int, picture: Tensor) -> tuple[Tensor, Tensor]:
    """A row's text and its image [D] each, computed by themselves: no packing, no padding, no neighbours."""
    net, plan = objective.net, batch.plan
    image = (net.image_projection(net.vision(picture)) + net.type_embedding.weight[1])[0]
    length, prefix = int(plan.lengths[number]), int(plan.prefix[number])
    ids, places = plan.text[number, :length].tolist(), range(length)
    readers = [[list(range(max(i + 1, prefix if i < prefix else 0))) for i in places]]
    if objective.name == "flm":
        readers.append([list(range(i, length)) for i in places])
    streams = [stream_states(net, ids, image, one, torch.zeros(()))[len(net.bottom) - 1] for one in readers]
    return torch.cat([states[1 : length - 1] for states in streams]).mean(0), image.mean(0)


def by_loops(objective: nn.Module, batch: Batch, pictures: Tensor) -> tuple[Tensor, float, int]:
    """The sum of losses, how many are found, and the number of pairs: the definition, pair by pair."""
    head, pairs = objective.itc_head, [n for n, row in enumerate(ROWS) if row.role == "pair"]
    found = {n: pooled_alone(objective, batch, n, pictures[ROWS[n].image]) for n in pairs}
    text = {n: head.text_projection(words) for n, (words, _) in found.items()}
    image = {ROWS[n].image: head.image_projection(tokens) for n, (_, tokens) in found.items()}

    def score(n: int, i: int) -> Tensor:
        return F.cosine_similarity(text[n], image[i], dim=0) * head.log_scale[0].exp()

    loss, correct = torch.zeros((), dtype=torch.float64), 0.0
    for n in pairs:
        own = score(n, ROWS[n].image)
        wrong_images = [score(n, i) for i in image if are_wrong(ROWS, ROWS[n], i)]
        wrong_texts = [score(m, ROWS[n].image) for m in pairs if are_wrong(ROWS, ROWS[m], ROWS[n].image)]
        for wrong in (wrong_images, wrong_texts):
            loss = loss - (own - torch.stack([own, *wrong]).exp().sum().log()) / 2
            correct += all(own > other for other in wrong) / 2
    return loss, correct, len(pairs)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_are_those_of_loops(name: str) -> None:
    """Several texts of an image, equal texts, a sample of two pictures, a negative, a read row and a placeholder."""
    objective, pictures = tiny_flm(name=name, **ON).double(), images(6)
    batch = objective.planner(pictures, ROWS)
    found = objective(batch)["itc"]
    expected, correct, number = by_loops(objective, batch, pictures)
    assert batch.counts["itc"] == number == 8
    assert found.dtype == torch.float32 and found > 1
    torch.testing.assert_close(found, expected.float(), rtol=TINY, atol=TINY)
    loss, score = objective.score(batch)["itc"]
    assert (float(loss), float(score)) == (float(found.detach()), correct)

    parts = [objective.itc_head, objective.net.embedding, objective.net.bottom, objective.net.image_projection]
    parameters = [parameter for part in parts for parameter in part.parameters()]
    moved, wanted = (torch.autograd.grad(one, parameters, allow_unused=True) for one in (found, expected))
    for one, other in zip(moved, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=10 * TINY)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_pooled_texts_and_images_know_nothing_of_others(name: str) -> None:
    """Another image moves that image alone; another text of a row that row alone, and no image."""
    objective, pictures = tiny_flm(name=name, **ON).double(), images(6)

    def pooled(pixels: Tensor, rows: list[Row]) -> tuple[Tensor, Tensor]:
        batch = objective.planner(pixels, rows)
        with torch.no_grad():
            texts, tokens = objective.pooled(objective.net(batch), batch)
        return texts[: len(rows)], tokens

    texts, tokens = pooled(pictures, ROWS)
    others = pictures.clone()
    others[1] = 255 - others[1]
    same_texts, moved = pooled(others, ROWS)
    assert torch.equal(same_texts, texts)
    assert ((moved - tokens).abs().amax(1) > 1e-6).tolist() == [number == 1 for number in range(6)]
    rows = [dataclasses.replace(row, token_ids=caption(9, 99)) if n == 1 else row for n, row in enumerate(ROWS)]
    moved, same_tokens = pooled(pictures, rows)
    assert torch.equal(same_tokens, tokens)
    assert ((moved - texts).abs().amax(1) > 1e-6).tolist() == [n == 1 for n in range(len(ROWS))]


def test_a_micro_batch_with_nothing_wrong_costs_nothing() -> None:
    """Invariant 4: one image, equal texts, placeholders alone; the loss is 0 and every gradient finite."""
    objective = tiny_flm(**ON)
    cases = [
        (1, [Row(caption(4, 1), 0, 1), Row(caption(5, 2), 0, 2)]),
        (2, [Row(caption(4, 1), 0, 1), Row(caption(4, 1), 1, 2)]),
        (2, [Row([0, 2], n, 0, "placeholder") for n in range(2)]),
    ]
    for count, rows in cases:
        batch = objective.planner(images(count), rows)
        found = objective(batch)
        assert (batch.counts["itc"], float(found["itc"].detach())) == (0, 0.0)
        sum(found.values()).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in objective.parameters())
        assert float(objective.score(batch)["itc"][1]) == 0
    one_sided = [Row(caption(4, 1), 0, 1), Row(caption(5, 2), 0, 2), Row(caption(4, 1), 1, 3)]
    batch = objective.planner(images(2), one_sided)  # text 1 has a wrong image, whose text is right for both images
    assert batch.terms["itc"].target.tolist() == [[False, True], [False, False]]
    loss = objective(batch)["itc"]
    loss.backward()
    assert loss.detach() > 0 and all(p.grad.isfinite().all() for p in objective.itc_head.parameters())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_other_terms_are_what_they_are_without_it(name: str) -> None:
    """And without it there is no parameter, no term and no target of it."""
    plain, objective = tiny_flm(name=name, negative_share=1.0), tiny_flm(name=name, negative_share=1.0, **ON)
    ours, theirs = (dict(one.named_parameters()) for one in (plain, objective))
    assert {one for one in theirs if one not in ours} == {one for one in theirs if one.startswith("itc_head.")}
    assert not any("itc" in one for one in ours) and len(ours) == len(theirs) - 5
    assert "itc" not in plain.term_weights and objective.term_weights == plain.term_weights | {"itc": 0.5}
    objective.load_state_dict(plain.state_dict(), strict=False)
    before, after = (one.planner(images(6), ROWS) for one in (plain, objective))
    assert before.counts == {term: count for term, count in after.counts.items() if term != "itc"}
    losses, more = plain(before), objective(after)
    assert losses.keys() == more.keys() - {"itc"}
    for term, loss in losses.items():
        torch.testing.assert_close(more[term], loss, rtol=TINY, atol=TINY, msg=term)


def test_every_word_counts_twice_whoever_reads_it() -> None:
    """A row's pooled text is the same with a negative caption, for whose sake all states are computed, and without."""
    objective = tiny_flm(**ON).double()
    rows = pair_rows([caption(4, 1), caption(6, 2)])
    found = []
    for more in ([], [Row(caption(3, 3), 0, 5, "negative")]):
        batch = objective.planner(images(2), [*rows, *more])
        with torch.no_grad():
            found.append(objective.pooled(objective.net(batch), batch)[0][:2])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=TINY)


def test_in_bf16_what_is_compared_and_its_loss_are_fp32() -> None:
    exact, halves = tiny_flm(**ON), tiny_flm(**ON).bfloat16()
    batch = exact.planner(images(6), ROWS)
    found = halves(batch)["itc"]
    assert found.dtype == torch.float32
    assert float(found.detach()) == pytest.approx(float(exact(batch)["itc"].detach()), rel=0.1)
    found.backward()
    assert all(p.grad.isfinite().all() for p in halves.itc_head.parameters())


def test_the_temperature_has_bounds() -> None:
    objective = tiny_flm(**ON).double()
    head, (texts, tokens) = objective.itc_head, torch.randn(2, 3, 32, dtype=torch.float64)
    assert head.log_scale.item() == pytest.approx(math.log(1 / 0.07))
    largest = {}
    for value in (-5.0, 0.0, math.log(100), 9.0):
        nn.init.constant_(head.log_scale, value)
        largest[value] = head(texts, tokens)
    assert torch.equal(largest[-5.0], largest[0.0]) and torch.equal(largest[9.0], largest[math.log(100)])
    torch.testing.assert_close(largest[9.0], 100 * largest[0.0], rtol=1e-5, atol=0)
    assert largest[0.0].dtype == torch.float32 and largest[0.0].abs().max() <= 1 + DOUBLE


def test_it_learns_as_a_head() -> None:
    objective = tiny_flm(**ON)
    names = [name for name, _ in objective.named_parameters() if name.startswith("itc_head.")]
    assert {objective.parameter_group(name) for name in names} == {"head"} and len(names) == 5
    assert not objective.decays("itc_head.log_scale", objective.itc_head.log_scale)


@pytest.mark.parametrize("name", ["flm", "mlm", "ar"])
def test_released_behaviour_refuses_it(name: str) -> None:
    options = objective_options(name=name, itc_weight=0.5)
    with pytest.raises(ValueError, match=r"^objective.itc_weight 0.5 has no released behaviour; use .* default$"):
        build_objective(tiny_config("released"), options, VOCABULARY, MAX_TEXT_LENGTH)


@pytest.mark.parametrize(("option", "value"), [("itc_weight", -1.0), ("itc_weight", math.inf), ("itc_width", 0)])
def test_a_number_out_of_its_range_is_refused(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"objective.{option} is {value}, expected"):
        objective_options(**{option: value}).check()


def test_a_micro_batch_of_one_is_refused() -> None:
    config = Config(objective=objective_options(itc_weight=0.5))
    config.optim.micro_batch_size = 1
    with pytest.raises(
        ConfigError, match="itc_weight 0.5 finds no other caption.*2 or more, or --objective.itc_weight 0"
    ):
        validate(config)
    config.optim.micro_batch_size = 2
    validate(config)
