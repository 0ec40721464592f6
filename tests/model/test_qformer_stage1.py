"""A Q-Former's first stage: who sees whom, the three losses against loops, which pairs are wrong ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.batch import Batch, Row
from model.build import build_objective
from model.config import ConnectorConfig, ModelConfig, QFormerStage1Options, TextConfig, VisionConfig, Vocabulary
from model.masks import queries_and_text, queries_and_two_texts
from model.objectives.qformer_stage1 import QFormerStage1, wrong_pairs
from tests.rounding import DOUBLE

VOCABULARY = Vocabulary(23, 0, 1, 2, 22)
QUERIES = 3


def small_model(**options: Any) -> QFormerStage1:
    """Random weights in double, no dropout."""
    torch.manual_seed(0)
    vision = VisionConfig(None, image_size=16, patch_size=8, width=16, layers=2, head_width=8)
    sizes = dict(num_tokens=QUERIES, width=16, heads=2, ffn_width=32, layers=3, max_positions=40, dropout=0.0)
    model = ModelConfig(vision=vision, connector=ConnectorConfig("qformer", **sizes | options))
    objective = build_objective(model, QFormerStage1Options(embedding_width=8), VOCABULARY, 30)
    for parameter in objective.parameters():  # zeros too, and large enough that scores differ
        torch.nn.init.normal_(parameter, std=0.3)
    return objective.double().eval()


def rows_of(*texts: list[int], samples: list[str] | None = None) -> list[Row]:
    names = samples or [str(number) for number in range(len(texts))]
    return [Row([0, *words, 2], n, 100 + n, "pair", names[n]) for n, words in enumerate(texts)]


def images_of(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 1, 3, 16, 16), dtype=torch.uint8)


TEXTS = ([5, 6, 7], [8, 9], [10, 11, 12, 13], [5, 14])


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(1, 4))
def test_masks_are_blips(lengths: list[int], num_queries: int) -> None:
    """Cell by cell, by the words of the paper's figure 2; no row sees nothing."""
    size, length = num_queries, max(lengths) + 1
    both = queries_and_two_texts(torch.tensor(lengths), size, length)
    joint = queries_and_text(torch.tensor(lengths), size, length)
    kinds = ["query"] * size + ["read"] * length + ["written"] * length
    places = [*range(size), *range(length), *range(length)]
    for row, real in enumerate(lengths):
        for i, (seer, at) in enumerate(zip(kinds, places, strict=True)):
            for j, (seen, there) in enumerate(zip(kinds, places, strict=True)):
                if seen == "query":
                    expected = seer != "read"
                else:
                    expected = seer == seen and there < real and (seen == "read" or there <= at)
                assert both[row, i, j] == expected
        for j in range(size + length):
            assert joint[row, :, j].tolist() == [j < size + real] * (size + length)
    assert both.any(2).all() and joint.any(2).all()


def test_losses_are_those_of_loops() -> None:
    """Each pair by itself, without padding: queries alone, text alone, the written text token by token, matching."""
    model = small_model()
    images, rows = images_of(4), rows_of(*TEXTS)
    batch = model.planner(images, rows)
    found = model(batch)
    connector, text, body = model.net.connector, model.net.text, model.net.connector.body
    tokens = connector.input(connector.norm(model.net.vision(images.flatten(0, 1)).double()))
    queries = [body(tokens[n : n + 1])[0] for n in range(4)]
    firsts = [_alone(model, row.token_ids)[0] for row in rows]

    similarity = model.similarity
    scores = torch.zeros(4, 4, dtype=torch.float64)
    for i in range(4):
        for j in range(4):
            theirs = similarity.text_projection(firsts[j])
            cosines = [F.cosine_similarity(similarity.image_projection(q), theirs, dim=0) for q in queries[i]]
            scores[i, j] = max(cosines) * similarity.log_scale.exp()
    itc = sum(-(scores[n].log_softmax(0)[n] + scores[:, n].log_softmax(0)[n]) / 2 for n in range(4))
    atol = 1e-5  # losses and scores are fp32 from states in double
    torch.testing.assert_close(found["itc"], itc.float(), rtol=0, atol=atol)

    itg = torch.zeros(())
    for n, row in enumerate(rows):
        for stop in range(1, len(row.token_ids)):
            state = _written(model, tokens[n : n + 1], row.token_ids[:stop])
            losses, _ = model.lm_head(state[None], torch.tensor([row.token_ids[stop]]))
            itg = itg + losses.sum()
    torch.testing.assert_close(found["itg"], itg, rtol=0, atol=atol)

    wrong_texts, wrong_images = wrong_pairs(scores, batch.plan.apart, batch.plan.draws)
    pairs = [(n, n, 1) for n in range(4)]
    pairs += [(n, int(wrong_texts[n]), 0) for n in range(4)] + [(int(wrong_images[n]), n, 0) for n in range(4)]
    assert all(i != t for i, t, right in pairs if not right)
    itm = torch.zeros(())
    for image, words, right in pairs:
        states = _together(model, tokens[image : image + 1], rows[words].token_ids)
        logits = model.itm_head(states).float().mean(0)
        itm = itm + F.cross_entropy(logits, torch.tensor(right))
    torch.testing.assert_close(found["itm"], itm, rtol=0, atol=atol)
    assert batch.counts == {"itc": 4, "itm": 12, "itg": sum(len(words) + 1 for words in TEXTS)}
    assert text.begin == VOCABULARY.size


def _embedded(model: QFormerStage1, ids: list[int]) -> Tensor:
    table = model.net.text.embedding
    found = table.word.weight[ids] + table.position.weight[2 : 2 + len(ids)] + table.token_type
    return F.layer_norm(found, (16,), table.norm.weight, table.norm.bias, table.norm.eps)[None]


def _layers(model: QFormerStage1, states: Tensor, allowed: Tensor, tokens: Tensor | None, num_queries: int) -> Tensor:
    """Post-LN layers by hand, on [1, S, D]; the first ``num_queries`` states are queries."""
    for layer, text_ffn in zip(model.net.connector.body.layers, model.net.text.layers, strict=True):
        heads = layer.attention.qkv(states)[0].unflatten(-1, (3, 2, 8))
        query, key, value = heads.unbind(1)
        scores = torch.einsum("ihc,jhc->hij", query, key) / 8**0.5
        weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
        mixed = torch.einsum("hij,jhc->ihc", weights, value).flatten(1)[None]
        states = layer.residual.norm(layer.attention.out(mixed) + states)
        queries, words = states[:, :num_queries], states[:, num_queries:]
        if layer.cross_attention is not None and num_queries:
            cross = layer.cross_attention
            query = cross.query(queries)[0].unflatten(-1, (2, 8))
            key, value = cross.key_value(tokens)[0].unflatten(-1, (2, 2, 8)).unbind(1)
            weights = (torch.einsum("ihc,jhc->hij", query, key) / 8**0.5).softmax(-1)
            mixed = torch.einsum("hij,jhc->ihc", weights, value).flatten(1)[None]
            queries = layer.cross_residual.norm(cross.out(mixed) + queries)
        states = torch.cat([layer.ffn(queries), text_ffn(words)], dim=1)
    return states[0]


def _alone(model: QFormerStage1, ids: list[int]) -> Tensor:
    return _layers(model, _embedded(model, ids), torch.ones(len(ids), len(ids), dtype=torch.bool), None, 0)


def _queries(model: QFormerStage1) -> Tensor:
    return model.net.connector.body.norm(model.net.connector.body.queries)[None]


def _written(model: QFormerStage1, tokens: Tensor, ids: list[int]) -> Tensor:
    """State of the last token of a text that is written, [D]."""
    states = torch.cat([_queries(model), _embedded(model, [VOCABULARY.size, *ids[1:]])], dim=1)
    allowed = torch.ones(states.shape[1], states.shape[1], dtype=torch.bool).tril()
    allowed[:QUERIES, :QUERIES] = True
    return _layers(model, states, allowed, tokens, QUERIES)[-1]


def _together(model: QFormerStage1, tokens: Tensor, ids: list[int]) -> Tensor:
    states = torch.cat([_queries(model), _embedded(model, ids)], dim=1)
    allowed = torch.ones(states.shape[1], states.shape[1], dtype=torch.bool)
    return _layers(model, states, allowed, tokens, QUERIES)[:QUERIES]


def test_nothing_written_depends_on_what_follows() -> None:
    """Nor on the text that is read: a change of the last word changes the state behind it alone."""
    model = small_model()
    images = images_of(2)
    first, second = (model.planner(images, rows_of([5, 6, 7], [8, last])) for last in (9, 10))
    found, other = model.net(first).words, model.net(second).words
    changed = (found - other).abs().amax(1) > DOUBLE
    length = first.plan.text.shape[1]
    assert changed[:length].sum() == 0 and changed[length : length + 2].sum() == 0 and changed[length + 2]


def test_padding_and_neighbours_change_matching_and_writing_by_nothing() -> None:
    model = small_model()
    images = images_of(4)
    together, alone = model.net(model.planner(images, rows_of(*TEXTS))), []
    for n, words in enumerate(TEXTS):
        [row] = rows_of(words)
        alone.append(model.net(model.planner(images[n : n + 1], [row])))
    for n, one in enumerate(alone):
        torch.testing.assert_close(together.queries[n], one.queries[0], rtol=0, atol=DOUBLE)
        torch.testing.assert_close(together.first[n], one.first[0], rtol=0, atol=DOUBLE)
        real = len(TEXTS[n]) + 2
        mine = together.words.unflatten(0, (4, -1))[n, :real]
        torch.testing.assert_close(mine, one.words[:real], rtol=0, atol=DOUBLE)


def test_the_longest_text_has_a_position_for_every_token() -> None:
    """Where padding goes beyond the table's rows."""
    model = small_model(max_positions=31 + 1)
    batch = model.planner(images_of(2), rows_of(list(range(3, 21)) + [4] * 10, [5]))
    assert int(batch.plan.lengths.max()) == 30 and batch.plan.text.shape[1] == 32
    assert all(torch.isfinite(value) for value in model(batch).values())


def test_what_may_be_true_of_an_image_is_no_wrong_text_of_it() -> None:
    """Equal captions, captions of one sample or image, unusable samples, captions without words: none is contrasted."""
    model = small_model()
    rows = rows_of([5, 6], [5, 6], [7, 8], [9], [10], [], samples=["a", "b", "c", "c", "d", "e"])
    rows[4] = Row([0, 2], 4, 0, "placeholder", "d")
    batch = model.planner(images_of(6), rows)
    assert batch.plan.apart[:4].tolist() == [
        [False, False, True, True, False, False],
        [False, False, True, True, False, False],
        [True, True, False, False, False, False],
        [True, True, False, False, False, False],
    ]
    assert not batch.plan.apart[4:].any()
    assert batch.terms["itc"].position.tolist() == [0, 1, 2, 3] and batch.counts["itm"] == 12
    assert batch.counts["itg"] == 3 + 3 + 3 + 2 + 1  # a caption without words is written too: its end
    texts, images = wrong_pairs(torch.randn(6, 6), batch.plan.apart, batch.plan.draws)
    assert all(batch.plan.apart[n, texts[n]] and batch.plan.apart[n, images[n]] for n in range(4))
    same = model.planner(images_of(2), rows_of([5], [5]))
    assert same.counts == {"itc": 0, "itm": 0, "itg": 4}
    sums = model(same)
    assert sums["itc"] == sums["itm"] == 0 and sums["itg"] > 0
    sum(sums.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_wrong_pairs_are_drawn_by_their_scores() -> None:
    """Frequencies over 3,000 draws are the softmax of the scores over wrong texts, within 5 standard deviations."""
    scores = torch.tensor([[0.0, 1.0, 2.0], [0.5, 0.0, -1.0], [1.0, 1.0, 0.0]])
    apart = ~torch.eye(3, dtype=torch.bool)
    count, found = 3_000, torch.zeros(2, 3, 3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        for way, chosen in enumerate(wrong_pairs(scores, apart, torch.rand(2, 3, 3, generator=generator))):
            found[way, range(3), chosen] += 1 / count
    for way, table in enumerate((scores, scores.T)):
        expected = table.masked_fill(~apart, float("-inf")).softmax(1)
        deviation = (expected * (1 - expected) / count).sqrt()
        assert ((found[way] - expected).abs() <= 5 * deviation).all()


def test_a_row_draws_what_its_seed_says() -> None:
    """Whatever rank plans it; nothing is drawn while the network runs."""
    model = small_model()
    images, rows = images_of(4), rows_of(*TEXTS)
    one, other = model.planner(images, rows), model.planner(images, rows)
    assert torch.equal(one.plan.draws, other.plan.draws)
    assert torch.equal(model(one)["itm"], model(one)["itm"])


@pytest.mark.parametrize("recompute", [False, True])
def test_its_gradients_reach_everything_but_padding(recompute: bool) -> None:
    model = small_model()
    model.net.connector.body.recompute = recompute
    model.train()
    batch = model.planner(images_of(4), rows_of(*TEXTS))
    sum(model(batch).values()).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []
    assert {model.parameter_group(name) for name, _ in model.named_parameters()} == {"rest", "cross", "head"}


def test_its_operations_are_those_of_its_products() -> None:
    """As torch counts them, forward, but for attention that torch's counter does not know on a CPU."""
    from torch.utils.flop_counter import FlopCounterMode

    model = small_model()
    batch: Batch = model.planner(images_of(4), rows_of(*TEXTS))
    with FlopCounterMode(display=False) as counter:
        model.score(batch)
    attention = _attention_macs(model, batch)
    counted = counter.get_total_flops() / 2
    vision = 4 * model.net.vision.macs
    mine = (model.flops(batch) - 6 * vision) / 6
    with FlopCounterMode(display=False) as counter:
        model.net.vision(batch.images.flatten(0, 1))
    counted -= counter.get_total_flops() / 2
    assert mine - attention == pytest.approx(counted, abs=0.02 * counted)


def _attention_macs(model: QFormerStage1, batch: Batch) -> int:
    """Of scores and sums, of all layers."""
    layers, tokens, length = model.net.connector.body.layers, model.net.vision.num_tokens, batch.plan.text.shape[1]
    total = 0
    for rows, words in ((4, 2 * length), (12, length)):
        for layer in layers:
            total += rows * 2 * (QUERIES + words) ** 2 * 16
            total += rows * 2 * QUERIES * tokens * 16 if layer.cross_attention is not None else 0
    return total


@pytest.mark.parametrize(
    ("model", "error"),
    [
        (dict(connector=ConnectorConfig("tomeformer")), "wants model.connector.name qformer, found tomeformer"),
        (dict(text=TextConfig(width=24)), "model.text.width has no effect: objective.name qformer_stage1 has no such"),
        (dict(behaviour="released"), "wants model.behaviour default, found released"),
        (dict(vision=VisionConfig(temporal="ordered")), "wants model.vision.temporal null, found ordered"),
        (dict(connector=ConnectorConfig("qformer", max_positions=31)), "model.connector.max_positions is 31; raise it"),
    ],
)
def test_what_does_not_fit_is_refused(model: dict[str, Any], error: str) -> None:
    given = dict(connector=ConnectorConfig("qformer")) | model
    with pytest.raises(ValueError, match=error):
        build_objective(ModelConfig(**given), QFormerStage1Options(), VOCABULARY, 30)


def test_weights_out_of_range_are_refused() -> None:
    for name, value in (("itc_weight", 0.0), ("itm_weight", float("nan")), ("embedding_width", 0)):
        with pytest.raises(ValueError, match=f"objective.{name} is {value}"):
            QFormerStage1Options(**{name: value}).check()
