"""Captioning: the loss of the l2r stream of any network, and the release's loss with its leak."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from model.batch import Row
from model.build import build_captioning, build_objective
from model.config import Vocabulary, objective_options
from model.objectives.captioning import with_added_tokens
from model.plans.captions import caption_form
from model.weights.start import RESIZES, start_from
from tests.rounding import TINY
from tests.tiny_flm import MAX_TEXT_LENGTH, VOCABULARY, caption, images, pair_rows, tiny_config, tiny_flm, with_text

HEAD = r"(?!net\.).+"
BOTH = {"r2l_weight": 0.5, "reconstruction_weight": 0.25}


def captioning(name: str = "flm", behaviour: str = "default", **weights: float):
    torch.manual_seed(0)
    built = build_captioning(tiny_config(behaviour), objective_options(name), VOCABULARY, MAX_TEXT_LENGTH, **weights)
    with torch.no_grad():
        for parameter_name, parameter in built.named_parameters():
            if parameter.ndim > 1 and "vision" not in parameter_name:
                parameter.mul_(1.6)
    return built.eval()


def started_from(pretrained, built):
    start_from(
        built,
        dict(pretrained.named_parameters()),
        fresh=[HEAD],
        dropped=[HEAD, *built.not_read],
        resizes=(*RESIZES, *built.resizes),
    )
    return built


@pytest.mark.parametrize(("name", "term"), [("flm", "l2r"), ("ar", "ar"), ("prefixlm", "prefixlm")])
def test_the_loss_is_that_of_the_pretrained_l2r_stream(name: str, term: str) -> None:
    """Same weights, same numbers: in fp32 on a CPU bit for bit for one stream, and to rounding for FLM's two."""
    options = {"prefix_share": 0.0} if name == "prefixlm" else {}
    pretrained = tiny_flm(name=name, itm_weight=0.0, negative_share=0.0, **options)
    built = started_from(pretrained, captioning(name))
    rows = pair_rows([caption(5), caption(9, 1), caption(1, 2)])
    theirs = pretrained.score(pretrained.planner(images(3), rows))[term]
    ours = built.score(built.planner()(images(3), rows))["caption"]
    torch.testing.assert_close(ours[0], theirs[0], rtol=0 if name != "flm" else TINY, atol=0)
    assert ours[1] == theirs[1]


def test_an_mlm_network_runs_causally() -> None:
    pretrained = tiny_flm(name="mlm")
    built = started_from(pretrained, captioning("mlm"))
    batch = built.planner()(images(1), pair_rows([caption(6)]))
    before = built.net(batch).l2r
    changed = batch.plan.text.clone()
    changed[0, 4] = 17
    after = built.net(with_text(batch, changed)).l2r
    assert torch.equal(after[:4], before[:4]) and not torch.allclose(after[4:], before[4:])
    assert torch.equal(built.net.embedding.word.weight, pretrained.net.embedding.word.weight)


def test_it_costs_what_ar_costs() -> None:
    """No r2l state, no query, no reconstructor, and none of their parameters."""
    rows = pair_rows([caption(5), caption(9, 1)])
    flm, ar = captioning("flm"), tiny_flm(name="ar", itm_weight=0.0, negative_share=0.0)
    batch, of_ar = flm.planner()(images(2), rows), ar.planner(images(2), rows)
    assert flm.flops(batch) == ar.flops(of_ar)
    assert len(batch.plan.l2r_index) == len(of_ar.plan.l2r_index)
    assert not len(batch.plan.r2l_index) and not len(batch.plan.query_index)
    assert {n for n, _ in flm.named_parameters()} == {n for n, _ in ar.named_parameters() if "itm_head" not in n}


@pytest.mark.parametrize("num_prompt", [0, 1, 3])
def test_words_of_the_prompt_are_read_not_predicted(num_prompt: int) -> None:
    """Every token after the prompt, the end token included, has the cross entropy of a pass over the whole caption."""
    ids = caption(7)
    built = captioning()
    batch = built.planner(num_prompt)(images(1), pair_rows([ids]))
    assert batch.terms["caption"].target.tolist() == ids[1 + num_prompt :]
    states = built.net(batch).l2r
    logits = built.lm_head.logits(states)[num_prompt:]
    expected = F.cross_entropy(logits, torch.tensor(ids[1 + num_prompt :]), reduction="sum")
    torch.testing.assert_close(built(batch)["caption"], expected, rtol=TINY, atol=0)


def test_no_state_knows_the_token_that_it_predicts() -> None:
    """Invariant 3."""
    for behaviour, name in (("default", "flm"), ("released", "ar")):
        built = captioning(name, behaviour)
        form = built.form
        batch = built.planner()(images(1), pair_rows([form.write(caption(6)[1:-1], MAX_TEXT_LENGTH)]))
        term = batch.terms["caption"]
        before = built.net(batch).l2r[term.position]
        first = 1 + len(form.begin)
        for number in range(len(term.target)):
            changed = batch.plan.text.clone()
            changed[0, first + number] = 17 if changed[0, first + number] != 17 else 18
            after = built.net(with_text(batch, changed)).l2r[term.position]
            assert torch.equal(after[: number + 1], before[: number + 1])


def test_the_released_form() -> None:
    form = caption_form(VOCABULARY, released=True)
    assert form.vocabulary.size == VOCABULARY.size + 2 and form.end_ids == (2, 62)
    assert form.write([5, 6], 50) == [0, 61, 5, 6, 62, 2]
    assert form.write([5, 6, 7, 8], 6) == [0, 61, 5, 6, 7, 2], "a long one is cut before </s>, as the release does"
    assert caption_form(VOCABULARY, released=False).write([5, 6], 50) == [0, 5, 6, 2]
    known = Vocabulary(3, 0, 1, 2, 0, word_starts=b"\1\1\1")
    assert len(caption_form(known, released=True).vocabulary.word_starts) == 5


def released_rows(built) -> list[Row]:
    return pair_rows([built.form.write(caption(count, count)[1:-1], MAX_TEXT_LENGTH) for count in (6, 1, 25)])


@torch.no_grad()
def test_released_flm_computes_the_releases_leaky_loss() -> None:
    """Position i of the reconstructor predicts token i+1 (specification section 7.3): cross entropy by hand on the
    features that the pretraining pass computes, i = 1..n-2; the weight of the mean is 0.5."""
    built = captioning("flm", "released")
    rows = released_rows(built)
    batch = built.planner()(images(3), rows)
    pretraining = build_objective(
        tiny_config("released"), objective_options("flm"), built.form.vocabulary, MAX_TEXT_LENGTH
    ).eval()
    whole = pretraining.planner(images(3), rows)  # all queries 1..n-1, the same network
    features, cells = built.net(whole).queries, whole.plan.query_index
    expected, count = torch.zeros(()), 0
    for row, ids in enumerate(one.token_ids for one in rows):
        for place in range(1, len(ids) - 1):
            [number] = (cells == row * whole.plan.text.shape[1] + place).nonzero().flatten().tolist()
            logits = built.lm_head.logits(features[number : number + 1])
            expected, count = expected + F.cross_entropy(logits, torch.tensor(ids[place + 1 : place + 2])), count + 1
    torch.testing.assert_close(built(batch)["caption"], expected, rtol=TINY, atol=0)
    assert batch.counts == {"caption": count} and built.term_weights == {"caption": 0.5}


@torch.no_grad()
def test_the_released_loss_leaks_and_says_so() -> None:
    """The query of position i moves with the token i+1 that it predicts, at every position."""
    built = captioning("flm", "released")
    batch = built.planner()(images(1), released_rows(built)[:1])
    before = built.net(batch).queries
    for place in range(1, len(before)):
        changed = batch.plan.text.clone()
        changed[0, place + 1] = 17 if changed[0, place + 1] != 17 else 18
        after = built.net(with_text(batch, changed)).queries
        assert not torch.allclose(after[place - 1], before[place - 1], atol=1e-4)
    assert "leaks" in type(built.planner()).__doc__


@torch.no_grad()
def test_the_sound_loss_in_released_form_is_that_of_the_forward_features() -> None:
    """Objective ar: cross entropy on the l2r features of FLM's whole pass with the same weights ("text_feats1")."""
    leaky = captioning("flm", "released")
    built = started_from(leaky, captioning("ar", "released"))
    rows = released_rows(built)
    whole = build_objective(
        tiny_config("released"), objective_options("flm"), built.form.vocabulary, MAX_TEXT_LENGTH
    ).planner(images(3), rows)
    features, cells, width = leaky.net(whole).l2r, whole.plan.l2r_index.tolist(), whole.plan.text.shape[1]
    expected = torch.zeros(())
    for row, ids in enumerate(one.token_ids for one in rows):
        places = [cells.index(row * width + place) for place in range(1, len(ids) - 1)]
        expected += F.cross_entropy(leaky.lm_head.logits(features[places]), torch.tensor(ids[2:]), reduction="sum")
    torch.testing.assert_close(built(built.planner()(images(3), rows))["caption"], expected, rtol=TINY, atol=0)


def test_weights_of_a_pretraining_run_grow_by_the_two_tokens() -> None:
    pretrained, built = tiny_flm("released"), captioning("flm", "released")
    started_from(pretrained, built)
    for name in ("net.embedding.word.weight", "lm_head.weight", "lm_head.bias"):
        ours, theirs = built.get_parameter(name), pretrained.get_parameter(name)
        assert torch.equal(ours[: len(theirs)], theirs) and len(ours) == len(theirs) + 2
        assert ours.ndim == 1 or ours[-2:].abs().max() > 0
    other = torch.zeros(7, 3)
    assert with_added_tokens(other, torch.Size([10, 3])) is other, "another vocabulary is refused as before"


def test_rows_without_a_caption_have_no_target() -> None:
    for built in (captioning(), captioning(**BOTH), captioning("flm", "released"), captioning("ar", "released")):
        rows = pair_rows([built.form.write(caption(3)[1:-1], MAX_TEXT_LENGTH), [0, 2]])
        rows[1] = dataclasses.replace(rows[1], role="placeholder")
        alone = built.planner()(images(2)[:1], rows[:1])
        both = built.planner()(images(2), rows)
        for name, loss in built(alone).items():
            torch.testing.assert_close(built(both)[name], loss, rtol=TINY, atol=0)
        assert both.counts == alone.counts
        empty = built.planner()(images(1), [dataclasses.replace(rows[1], image=0)])
        assert set(built(empty)) == set(built.term_weights) and not any(built(empty).values())


@pytest.mark.parametrize("terms", [("caption", "r2l"), ("caption", "r2l", "flm")])
@pytest.mark.parametrize("boundary_states", [False, True])
def test_the_other_directions_learn_what_they_learned_in_pretraining(terms: tuple[str, ...], boundary_states) -> None:
    """Same weights, same captions and seeds, same losses; without its weight the reconstructor is not there."""
    torch.manual_seed(0)
    options = objective_options("flm", itm_weight=0.0, negative_share=0.0)
    config = tiny_config(boundary_states=boundary_states)
    pretrained = build_objective(config, options, VOCABULARY, MAX_TEXT_LENGTH).eval()
    weights = dict(list(BOTH.items())[: len(terms) - 1])
    built = build_captioning(config, options, VOCABULARY, MAX_TEXT_LENGTH, **weights).eval()
    started_from(pretrained, built)
    assert built.term_weights == dict(zip(terms, (1.0, 0.5, 0.25)))
    names = {name for name, _ in built.named_parameters()}
    assert any("reconstructor" in name for name in names) == ("flm" in terms)
    assert all(torch.equal(value, pretrained.get_parameter(name)) for name, value in built.named_parameters())
    rows = pair_rows([caption(5), caption(9, 1), caption(1, 2)])
    theirs = pretrained.score(pretrained.planner(images(3), rows))
    ours = built.score(built.planner()(images(3), rows))
    assert set(ours) == set(terms)
    for name in terms:
        found, expected = ours[name], theirs["l2r" if name == "caption" else name]
        torch.testing.assert_close(found[0], expected[0], rtol=TINY, atol=0)
        assert found[1] == expected[1]


@torch.no_grad()
def test_no_direction_knows_the_token_that_it_predicts() -> None:
    """Invariant 3: what a target is predicted from moves with no other token than those it may see, from which on; and
    with each of those."""
    built, num_prompt = captioning(**BOTH), 1
    batch = built.planner(num_prompt)(images(1), pair_rows([caption(6)]))
    words = range(1 + num_prompt, 7)
    assert [batch.terms[name].target.tolist() for name in ("caption", "r2l", "flm")] == [
        [*batch.plan.text[0, list(words)].tolist(), 2],
        *[batch.plan.text[0, list(words)].tolist()] * 2,
    ]
    spans = dict(zip(batch.plan.query_index.tolist(), batch.plan.query_span.tolist(), strict=True))
    before = built.net(batch)
    for changed in range(1, 7):
        text = batch.plan.text.clone()
        text[0, changed] = 17 if text[0, changed] != 17 else 18
        after = built.net(with_text(batch, text))
        for name, seen in (
            ("caption", lambda target: changed < target),  # noqa: B023
            ("r2l", lambda target: changed > target),  # noqa: B023
            ("flm", lambda target: not spans[target][0] <= changed <= spans[target][1]),  # noqa: B023
        ):
            term = batch.terms[name]
            states, others = (getattr(one, term.source)[term.position] for one in (before, after))
            for place, target in enumerate([*words, 7][: len(states)]):
                assert torch.equal(states[place], others[place]) != seen(target), (name, target, changed)


def test_the_reverse_stream_is_computed_where_it_is_read_and_learns() -> None:
    built = captioning(r2l_weight=1.0).train()
    batch = built.planner()(images(2), pair_rows([caption(5), caption(1)]))
    assert batch.plan.r2l_index.tolist() == [2, 3, 4, 5, 6, 8 + 2] and not len(batch.plan.query_index)
    built(batch)["r2l"].backward()
    assert built.net.stream_embedding.weight.grad[0].abs().max() > 0
    one_way = captioning().flops(captioning().planner()(images(2), pair_rows([caption(5), caption(1)])))
    assert one_way < built.flops(batch) < 2 * one_way


def test_directions_that_can_not_learn_are_refused() -> None:
    for behaviour, name, more, message in (
        ("default", "ar", {}, "task.r2l_weight is for objective.name flm, found ar"),
        ("released", "flm", {}, "task.r2l_weight has no released behaviour"),
        ("default", "flm", {"self_critical": True}, "task.r2l_weight is not for task.self_critical"),
    ):
        with pytest.raises(ValueError, match=message):
            captioning(name, behaviour, r2l_weight=1.0, **more)
