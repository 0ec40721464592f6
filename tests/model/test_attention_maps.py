"""Attention of words to image tokens, against softmax by its definition; and where a tower's tokens stand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from model.attention_maps import on_grid, text_attention_map, word_attention
from model.batch import Batch, Row
from model.config import VisionConfig
from model.vision.tower import Grid, build_tower, grid_of
from tests.model.test_features import OBJECTIVES, cross_attended, feed_forward, heads_of, self_attended
from tests.model.vision.test_tower import hf_folder, open_clip_models  # noqa: F401 (a fixture)
from tests.rounding import TINY
from tests.tiny_flm import caption, images, pair_rows, tiny_flm


def plain_attention(layer: nn.Module, states: Tensor, image: Tensor) -> Tensor:
    """[N, P] of states [N, D] that come out of the self-attention of a top layer; mean over the heads."""
    query, (key, _) = layer.cross_attention.query(states), layer.cross_attention.key_value(image).chunk(2, dim=-1)
    num_heads = layer.cross_attention.num_heads
    each = zip(heads_of(query, num_heads), heads_of(key, num_heads), strict=True)
    return torch.stack([(q @ k.T / math.sqrt(q.shape[1])).softmax(-1) for q, k in each]).mean(0)


def plain_stream(net: nn.Module, ids: list[int], image: Tensor, readers: list[list[int]], kind: Tensor) -> Tensor:
    """[L, T, P]: what each top layer attended to."""
    states, found = net.embedding(torch.tensor(ids), torch.arange(len(ids))), []
    for layer in net.bottom:
        states = feed_forward(layer.ffn, self_attended(layer, states, readers))
    states = net.text_projection(states) + kind
    for layer in net.top:
        states = self_attended(layer, states, readers)
        found.append(plain_attention(layer, states, image))
        states = feed_forward(layer.ffn, cross_attended(layer, states, image))
    return torch.stack(found)


@pytest.mark.parametrize("options", OBJECTIVES)
@torch.no_grad()
def test_attention_of_words_equals_the_definition(options: dict) -> None:
    """Two images a sample, rows of other lengths about any of them, several rows about one."""
    objective = tiny_flm(**options)
    net, pictures = objective.net, images(4).view(2, 2, 3, 32, 32)
    net.type_embedding = nn.Embedding(3, 32)  # two images a sample
    texts, about = [caption(4, 1), caption(9, 2), caption(1, 3), caption(6, 4)], [3, 0, 3, 2]
    rows = [Row(ids, image, number, "read") for number, (ids, image) in enumerate(zip(texts, about))]
    batch = objective.planner(pictures, rows)
    tokens = net.image_projection(net.vision(pictures.flatten(0, 1)))
    tokens = tokens + net.type_embedding.weight[[1, 2, 1, 2], None]
    found, last = word_attention(net, batch), word_attention(net, batch, last=1)
    assert found.shape == (*batch.plan.text.shape, tokens.shape[1]) and found.dtype == torch.float32
    for number, (ids, image) in enumerate(zip(texts, about)):
        length = len(ids)
        left = [list(range(i + 1)) for i in range(length)]
        right = [list(range(i, length)) for i in range(length)]
        if "behaviour" in options:  # released: `<s>` sees all and is seen by none
            left = [list(range(length)), *(list(range(1, i + 1)) for i in range(1, length))]
            right[0] = list(range(length))
        if options["name"] == "mlm":
            left = [list(range(length))] * length
        if options["name"] == "prefixlm":
            prefix = length - 1 if "prefix_share" not in options else int(0.5 * (length - 2)) + 1
            left = [list(range(max(i + 1, prefix if i < prefix else 0))) for i in range(length)]
        streams = [plain_stream(net, ids, tokens[image], left, net.type_embedding.weight[0])]
        if options["name"] == "flm":
            streams.append(plain_stream(net, ids, tokens[image], right, net.stream_embedding.weight[0]))
        expected = torch.stack(streams).mean(0)  # [L, T, P]
        words = slice(1, length - 1)
        torch.testing.assert_close(found[number, words], expected.mean(0)[words], rtol=TINY, atol=TINY)
        torch.testing.assert_close(last[number, words], expected[-1][words], rtol=TINY, atol=TINY)
        assert not found[number, length:].any()
        whole = text_attention_map(found[number : number + 1], [length])[0]
        torch.testing.assert_close(whole, expected.mean(0)[words].mean(0), rtol=TINY, atol=TINY)
    assert (found[0, 1] - found[0, 2]).abs().max() > 1e-3, "words differ, or the test says nothing"


@pytest.mark.parametrize("name", ["flm", "mlm", "ar"])
@pytest.mark.parametrize("behaviour", ["default", "released"])
@torch.no_grad()
def test_the_recorded_weights_are_those_that_mix_the_values(name: str, behaviour: str) -> None:
    """In plans of training, where not every state is computed; the outputs of the network stay as they are."""
    objective = tiny_flm(behaviour, name=name)
    net = objective.net
    batch = objective.planner(images(3), pair_rows([caption(5, 1), caption(9, 2), caption(2, 3)]))
    before, seen = net(batch), []
    module = net.top[-1].cross_attention
    hook = module.register_forward_hook(lambda _, inputs, output: seen.append((*inputs, output)))
    words = word_attention(net, batch, last=1)
    hook.remove()
    [(states, context, attend, output)] = seen
    value = module.key_value(context).chunk(2, dim=-1)[1].view(3, -1, 32)
    row, position = attend.cells
    length = batch.plan.text.shape[1]
    one_head = plain_weights(module, states, context.view(3, -1, 32), row)
    mixed = torch.cat(
        [torch.einsum("sp,spd->sd", w, value[row][..., part]) for w, part in zip(one_head, halves(32))], dim=1
    )
    torch.testing.assert_close(module.out(mixed), output, rtol=TINY, atol=TINY)
    for r in range(3):
        for t in range(length):
            here = (row == r) & (position % length == t)
            expected = one_head.mean(0)[here].mean(0) if here.any() else torch.zeros(words.shape[-1])
            torch.testing.assert_close(words[r, t], expected, rtol=TINY, atol=TINY)
    torch.testing.assert_close(words.sum(-1), words.any(-1).float(), rtol=TINY, atol=TINY)
    for one, other in zip(before, net(batch), strict=True):
        assert torch.equal(one, other) and not module._forward_pre_hooks


def plain_weights(module: nn.Module, states: Tensor, context: Tensor, row: Tensor) -> Tensor:
    """[H, S, P] of two heads."""
    query, key = module.query(states), module.key_value(context).chunk(2, dim=-1)[0][row]
    scores = [torch.einsum("sd,spd->sp", query[:, part], key[..., part]) / 4 for part in halves(32)]
    return torch.stack(scores).softmax(-1)


def halves(width: int) -> list[slice]:
    return [slice(0, width // 2), slice(width // 2, width)]


def test_what_has_no_attention_says_so() -> None:
    objective = tiny_flm()
    batch = objective.planner(images(1), [Row(caption(3), 0, 0, "read")])
    with pytest.raises(ValueError, match="in evaluation mode"):
        word_attention(objective.net.train(), batch)
    with pytest.raises(ValueError, match="a network with top layers"):
        word_attention(nn.Linear(1, 1).eval(), Batch(images(1), {}))


def test_a_text_without_words_has_the_map_of_its_states() -> None:
    words = torch.zeros(3, 3, 4)
    words[0, 0], words[0, 1] = torch.tensor([[1.0, 0, 0, 0], [0, 0, 1.0, 0]])
    words[1, 1] = torch.tensor([0, 0.5, 0.5, 0])
    found = text_attention_map(words, [2, 3, 3])
    assert found.tolist() == [[0.5, 0, 0.5, 0], [0, 0.5, 0.5, 0], [0, 0, 0, 0]]


def test_on_grid_leaves_out_tokens_that_stand_nowhere() -> None:
    attention = torch.arange(7.0).expand(2, 7)
    assert on_grid(attention, Grid(2, 3, 1)).tolist() == [[[1, 2, 3], [4, 5, 6]]] * 2


def tokens_of_cells(tower: nn.Module, size: int, cells: tuple[int, int]) -> list[list[int]]:
    """For each cell of the image the tokens that change with it."""
    blank = torch.full((1, 3, size, size), 90, dtype=torch.uint8)
    height, width = size // cells[0], size // cells[1]
    found = []
    with torch.no_grad():
        base = tower(blank)
        for row in range(cells[0]):
            for column in range(cells[1]):
                changed = blank.clone()
                changed[..., row * height : (row + 1) * height, column * width : (column + 1) * width] = 200
                found.append(((tower(changed) - base)[0].abs().amax(1) > 0).nonzero().flatten().tolist())
    return found


MIXERS = (
    ".out",
    "attn.proj",
    "attn.out_proj",
    "attention.o_proj",
    "attention.output.dense",
)  # what an attention layer adds to the tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "leading"),
    [(None, 1), ("timm/test_vit", 1), ("open_clip/tiny-vit", 1), ("ViT", 1), ("SiglipVision", 0)]
    + [("Dinov2WithRegisters", 5)],
)
def test_the_grid_of_a_tower_is_where_its_tokens_look(
    name: str | None,
    leading: int,
    tmp_path: Path,
    open_clip_models: None,  # noqa: F811
) -> None:
    """Without attention a token sees its own cell and no other."""
    import transformers

    if name and "/" not in name:
        sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, patch_size=16)
        name = f"hf/{hf_folder(tmp_path / name, getattr(transformers, f'{name}Config')(**sizes, image_size=48))}"
    torch.manual_seed(0)
    tower = build_tower(VisionConfig(name=name, image_size=48, patch_size=16, width=32, layers=2, head_width=16)).eval()
    grid = grid_of(tower)
    assert grid == Grid(3, 3, leading) and tower.num_tokens == leading + 9
    mixers = [module for name, module in tower.named_modules() if name.endswith(MIXERS)]
    assert mixers
    for module in mixers:
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
    assert tokens_of_cells(tower, 48, (3, 3)) == [[leading + cell] for cell in range(9)]


def test_the_grid_of_a_map_is_its_own_and_that_of_merged_patches_is_unknown(tmp_path: Path) -> None:
    import transformers

    assert grid_of(build_tower(VisionConfig(name="timm/test_resnet", image_size=96))) == Grid(3, 3, 0)
    sizes = dict(image_size=64, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=2)
    folder = hf_folder(tmp_path / "swin", transformers.SwinConfig(**sizes))
    swin = build_tower(VisionConfig(name=f"hf/{folder}", image_size=64))
    assert swin.num_tokens == 64 and grid_of(swin) is None
    assert grid_of(nn.Identity()) is None
