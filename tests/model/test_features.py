"""Features of read rows against the network run naively: one row at a time, without padding, packing or masks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.batch import Row
from tests.rounding import TINY
from tests.tiny_flm import caption, images, pair_rows, tiny_flm

OBJECTIVES = [
    dict(name="flm", corruption_rate=0.4),
    dict(name="mlm"),
    dict(name="ar"),
    dict(name="prefixlm"),
    dict(name="prefixlm", prefix_share=0.5),
    dict(behaviour="released", name="flm", corruption_rate=0.4),
    dict(behaviour="released", name="mlm"),
    dict(behaviour="released", name="ar"),
]


def heads_of(states: Tensor, num_heads: int) -> list[Tensor]:
    return list(states.chunk(num_heads, dim=-1))


def mixed(queries: Tensor, keys: Tensor, values: Tensor, num_heads: int, readers: list[list[int]]) -> Tensor:
    """Attention by its definition, query by query: query number i reads the keys ``readers[i]``."""
    rows = []
    for query, readable in zip(queries, readers, strict=True):
        parts = []
        for q, k, v in zip(*(heads_of(x, num_heads) for x in (query, keys, values)), strict=True):
            weights = (k[readable] @ q / math.sqrt(len(q))).softmax(0)
            parts.append(weights @ v[readable])
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def feed_forward(layer: nn.Module, states: Tensor) -> Tensor:
    return layer.residual.norm(layer.down(F.gelu(layer.up(states))) + states)


def self_attended(layer: nn.Module, states: Tensor, readers: list[list[int]]) -> Tensor:
    query, key, value = layer.attention.qkv(states).chunk(3, dim=-1)
    update = layer.attention.out(mixed(query, key, value, layer.attention.num_heads, readers))
    return layer.residual.norm(update + states)


def cross_attended(layer: nn.Module, states: Tensor, context: Tensor) -> Tensor:
    key, value = layer.cross_attention.key_value(context).chunk(2, dim=-1)
    everything = [list(range(len(context)))] * len(states)
    update = mixed(layer.cross_attention.query(states), key, value, layer.cross_attention.num_heads, everything)
    return layer.cross_residual.norm(layer.cross_attention.out(update) + states)


def stream_states(
    net: nn.Module, ids: list[int], image: Tensor, readers: list[list[int]], kind: Tensor
) -> list[Tensor]:
    """States of one stream after every layer, bottom and top."""
    states = net.embedding(torch.tensor(ids), torch.arange(len(ids)))
    outputs = []
    for layer in net.bottom:
        states = feed_forward(layer.ffn, self_attended(layer, states, readers))
        outputs.append(states)
    states = net.text_projection(states) + kind
    for layer in net.top:
        states = feed_forward(layer.ffn, cross_attended(layer, self_attended(layer, states, readers), image))
        outputs.append(states)
    return outputs


def plain_features(objective: nn.Module, ids: list[int], picture: Tensor, image_type: int = 1) -> Tensor:
    """[2D] of one text about one picture, uint8 [1, 3, S, S]; ``image_type``: 1 + its number in its sample."""
    net, length = objective.net, len(ids)
    planner = getattr(objective.planner, "planner", objective.planner)
    image = (net.image_projection(net.vision(picture)) + net.type_embedding.weight[image_type])[0]
    l2r_kind, words = net.type_embedding.weight[0], slice(1, length - 1)
    left = [list(range(i + 1)) for i in range(length)]
    right = [list(range(i, length)) for i in range(length)]
    if released := objective.config.behaviour == "released":  # `<s>` sees all and is seen by none
        left = [list(range(length)), *(list(range(1, i + 1)) for i in range(1, length))]
        right[0] = list(range(length))
    if objective.name != "flm":
        num_words, share = length - 2, planner.prefix_share if objective.name == "prefixlm" else 0.0
        readers = [list(range(length))] * length if objective.name == "mlm" else left
        if objective.name == "prefixlm":
            prefix = num_words + 1 if share is None else int(share * num_words) + 1
            readers = [list(range(max(i + 1, prefix if i < prefix else 0))) for i in range(length)]
        states = stream_states(net, ids, image, readers, l2r_kind)[-1]
        return torch.cat([states[0 if released or objective.name == "mlm" else -1], states[words].mean(0)])
    l2r = stream_states(net, ids, image, left, l2r_kind)
    r2l = stream_states(net, ids, image, right, net.stream_embedding.weight[0])
    query = net.embedding(torch.tensor([ids[0]]), torch.tensor([0]))
    reconstructors = [*net.reconstructor_bottom, *net.reconstructor_top]
    for number, layer in enumerate(reconstructors):
        if number == len(net.bottom):
            query = net.text_projection(query) + net.stream_embedding.weight[1]
        query = feed_forward(layer.ffn, cross_attended(layer, query, torch.cat([l2r[number], r2l[number]])))
    mean = torch.cat([l2r[-1][words], r2l[-1][words]]).mean(0)
    return torch.cat([query[0], mean])


@pytest.mark.parametrize("options", OBJECTIVES)
@torch.no_grad()
def test_features_equal_the_network_run_row_by_row(options: dict) -> None:
    """Any row reads any image; more rows than images; padding, packing and neighbours change nothing (invariant 5)."""
    objective, pictures = tiny_flm(**options), images(3)
    texts = [caption(4, 1), caption(11, 2), caption(1, 3), caption(6, 4), caption(2, 5)]
    rows = [
        Row(ids, image, seed=number, role="read") for number, (ids, image) in enumerate(zip(texts, [2, 0, 2, 2, 0]))
    ]
    found = objective.features(objective.planner(pictures, rows))
    expected = torch.stack([plain_features(objective, row.token_ids, pictures[row.image]) for row in rows])
    assert found.dtype == torch.float32 and found.shape == (5, 64)
    torch.testing.assert_close(found, expected, rtol=TINY, atol=TINY)
    one_picture = objective.features(objective.planner(pictures[:1], [Row(texts[0], 0, 9, "read")] * 2))
    torch.testing.assert_close(
        one_picture, plain_features(objective, texts[0], pictures[0]).expand(2, -1), rtol=TINY, atol=TINY
    )


@pytest.mark.parametrize("options", OBJECTIVES)
def test_features_depend_on_every_word_and_on_the_own_image_only(options: dict) -> None:
    objective, pictures = tiny_flm(**options).double(), images(2)

    def of(ids: list[int], pixels: Tensor = pictures) -> Tensor:
        rows = [Row(ids, 1, 1, "read"), Row(caption(3, 8), 0, 2, "read")]
        with torch.no_grad():
            return objective.features(objective.planner(pixels, rows))

    ids = caption(5, 1)
    base, width = of(ids), 32
    for position in range(1, 6):
        changed = ids[:position] + [3 + (ids[position] + 17) % 50] + ids[position + 1 :]
        moved = (of(changed) - base).abs()
        assert moved[0, :width].max() > 1e-5 and moved[0, width:].max() > 1e-5 and moved[1].max() == 0
    moved = (of(ids, torch.cat([pictures[:1], images(1, seed=7)])) - base).abs()
    assert moved[0, :width].max() > 1e-5 and moved[0, width:].max() > 1e-5 and moved[1].max() == 0


@pytest.mark.parametrize("options", OBJECTIVES)
def test_read_rows_leave_losses_as_they_are(options: dict) -> None:
    """Beside pairs, a negative and a placeholder; features have a gradient and no targets are counted."""
    objective, pictures = tiny_flm(**options), images(3)
    rows = [*pair_rows([caption(4, 1), caption(9, 2)]), Row([0, 2], 2, 0, "placeholder")]
    rows.append(Row(caption(6, 9), 0, seed=5, role="negative"))
    read = [Row(caption(7, 3), 0, 11, "read"), Row(caption(2, 4), 2, 12, "read")]
    without, beside = objective.planner(pictures, rows), objective.planner(pictures, rows + read)
    assert beside.counts == without.counts and "read" not in without.terms
    assert objective.score(beside).keys() == objective.score(without).keys()
    for name, value in objective(without).items():
        torch.testing.assert_close(objective(beside)[name], value, rtol=TINY, atol=TINY)
    features = objective.features(beside)
    torch.testing.assert_close(features, objective.features(objective.planner(pictures, read)), rtol=TINY, atol=TINY)
    features.sum().backward()
    assert all(
        objective.net.vision.get_parameter(name).grad is not None for name, _ in objective.net.vision.named_parameters()
    )


def test_a_text_without_words_has_no_mean() -> None:
    objective = tiny_flm()
    features = objective.features(objective.planner(images(1), [Row([0, 2], 0, 0, "read")]))
    assert features[0, :32].abs().min() > 0 and not features[0, 32:].any()


def test_released_flm_runs_one_query_for_a_text_that_is_only_read() -> None:
    batch = tiny_flm("released").planner(images(2), [Row(caption(n), n % 2, 0, "read") for n in (3, 7)])
    assert batch.plan.query_index.tolist() == [0, 16] and batch.plan.query_span.tolist() == [[5, -1], [9, -1]]


def test_what_cannot_be_read_is_refused() -> None:
    objective = tiny_flm()
    with pytest.raises(ValueError, match="rows read images 0 to 2, expected 0 to 1"):
        objective.planner(images(2), [Row(caption(3), image, 0, "read") for image in (0, 2)])
    with pytest.raises(ValueError, match='the role "read"'):
        objective.features(objective.planner(images(1), pair_rows([caption(3)])))
