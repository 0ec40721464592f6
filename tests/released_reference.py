"""The released model's CLS feature and task heads computed plainly from a released state dict, text by text.

Padded as the release pads, with additive masks and functions of PyTorch alone, after sections 2, 3 and 7 of the
specification; nothing here is shared with the package.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

HIDDEN, HEADS, PATCH = -10000.0, 4, 32
State = Mapping[str, Tensor]


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def attention(query: Tensor, key: Tensor, value: Tensor, num_heads: int, mask: Tensor | float = 0.0) -> Tensor:
    """[Q, D], [K, D], [K, D] -> [Q, D]; ``mask`` is added to the scores [Q, K]."""
    mixed = []
    for q, k, v in zip(*(x.chunk(num_heads, dim=1) for x in (query, key, value)), strict=True):
        mixed.append((q @ k.T / q.shape[1] ** 0.5 + mask).softmax(1) @ v)
    return torch.cat(mixed, 1)


def vision_tokens(state: State, pixels: Tensor) -> Tensor:
    """Normalised pixels [3, S, S] -> [1 + (S/32)^2, W]."""
    patches = F.conv2d(pixels[None], state["vit_model.visual.conv1.weight"], stride=PATCH)[0].flatten(1).T
    tokens = torch.cat([state["vit_model.visual.class_embedding"][None], patches])
    tokens = norm(state, "vit_model.visual.ln_pre", tokens + state["vit_model.visual.positional_embedding"], 1e-5)
    number = 0
    while f"{(block := f'vit_model.visual.transformer.resblocks.{number}')}.ln_1.weight" in state:
        inner = norm(state, f"{block}.ln_1", tokens, 1e-5)
        qkv = F.linear(inner, state[f"{block}.attn.in_proj_weight"], state[f"{block}.attn.in_proj_bias"]).chunk(3, 1)
        tokens = tokens + linear(state, f"{block}.attn.out_proj", attention(*qkv, tokens.shape[1] // 64))
        hidden = linear(state, f"{block}.mlp.c_fc", norm(state, f"{block}.ln_2", tokens, 1e-5))
        tokens = tokens + linear(state, f"{block}.mlp.c_proj", hidden * torch.sigmoid(1.702 * hidden))
        number += 1
    return norm(state, "vit_model.visual.ln_post", tokens, 1e-5)


def attended(
    state: State, name: str, x: Tensor, context: Tensor, eps: float, mask: Tensor | float, num_heads: int = HEADS
) -> Tensor:
    """A BERT attention block, residual and LayerNorm included."""
    parts = (
        linear(state, f"{name}.self.{each}", y) for each, y in (("query", x), ("key", context), ("value", context))
    )
    update = linear(state, f"{name}.output.dense", attention(*parts, num_heads, mask))
    return norm(state, f"{name}.output.LayerNorm", update + x, eps)


def fed_forward(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    hidden = F.gelu(linear(state, f"{name}.intermediate.dense", x))
    return norm(state, f"{name}.output.LayerNorm", linear(state, f"{name}.output.dense", hidden) + x, eps)


def embedded(state: State, ids: Tensor, is_real: Tensor) -> Tensor:
    name = "text_transformer.embeddings"
    position = torch.where(is_real, 1 + is_real.cumsum(0), 1)
    total = state[f"{name}.word_embeddings.weight"][ids] + state[f"{name}.position_embeddings.weight"][position]
    return norm(state, f"{name}.LayerNorm", total + state[f"{name}.token_type_embeddings.weight"][0], 1e-5)


def additive(visible: Tensor) -> Tensor:
    return torch.where(visible, 0.0, HIDDEN)


def stream_masks(length: int, padded: int) -> tuple[Tensor, Tensor, Tensor]:
    """bool [L, L]: of the forward stream, the reverse stream, and bidirectional; real rows as section 3 draws them."""
    i, j = torch.arange(padded)[:, None], torch.arange(padded)[None]
    forward = (j <= i) & (j < length)
    forward[0] = j[0] < length
    forward[1:, 0] = False
    reverse = forward.clone()
    block = slice(1, length)
    reverse[block, block] = forward[block, block].T
    return forward, reverse, (j < length).expand(padded, -1)


def feature(
    state: State, ids: list[int], pixels: Tensor, image_type: int = 1, kind: str = "flm", padded: int = 16
) -> Tensor:
    """The pooled CLS feature [D] of a text ``<s> .. </s>`` and normalised pixels; ``kind`` flm, ar or mlm."""
    text = torch.tensor([*ids, *[1] * (padded - len(ids))])
    is_real = torch.arange(padded) < len(ids)
    image = linear(state, "cross_modal_image_transform", vision_tokens(state, pixels))
    image = image + state["token_type_embeddings.weight"][image_type]
    forward, reverse, whole = (additive(mask) for mask in stream_masks(len(ids), padded))
    l2r, r2l = state["token_type_embeddings.weight"][0], state["token_type_embeddings_flm.weight"]
    streams = {"flm": [(forward, l2r), (reverse, r2l[0])], "ar": [(forward, l2r)], "mlm": [(whole, l2r)]}[kind]
    states = [embedded(state, text, is_real) for _ in streams]
    query = embedded(state, text[:1], is_real[:1])
    cls_mask = additive(is_real).repeat(2)[None]
    half, number = "bottom", 0
    while half != "end":
        text_layer = ("text_transformer.encoder.layer.", "cross_modal_text_layers.")[half == "top"] + str(number)
        if f"{text_layer}.output.dense.weight" not in state:
            half, number = ("top", "end")[half == "top"], 0
            if half == "top":
                project = lambda x: linear(state, "cross_modal_text_transform", x)  # noqa: E731
                states = [project(x) + kind_row for x, (_, kind_row) in zip(states, streams, strict=True)]
                query = project(query) + r2l[1]
            continue
        eps = 1e-12 if half == "top" else 1e-5
        for at, (mask, _) in enumerate(streams):
            x = attended(state, f"{text_layer}.attention", states[at], states[at], eps, mask)
            if half == "top":
                x = attended(state, f"{text_layer}.crossattention", x, image, eps, 0.0)
            states[at] = fed_forward(state, text_layer, x, eps)
        if kind == "flm":
            layer = f"fusion_layers_{half}.{number}"
            query = attended(state, f"{layer}.crossattention", query, torch.cat(states), 1e-12, cls_mask)
            query = fed_forward(state, layer, query, 1e-12)
        number += 1
    if kind == "flm":
        return torch.tanh(linear(state, "cross_modal_text_pooler_f.dense", query[0]))
    return torch.tanh(linear(state, "cross_modal_text_pooler.dense", states[0][0]))


def classified(state: State, head: str, features: Tensor) -> Tensor:
    """Logits of ``vqa_classifier`` or ``nlvr2_classifier`` for the features of all images side by side."""
    hidden = F.gelu(norm(state, f"{head}.1", linear(state, f"{head}.0", features), 1e-5))
    return linear(state, f"{head}.3", hidden)
