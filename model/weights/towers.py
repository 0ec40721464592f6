"""Weights of CLIP, RoBERTa and BERT: which of their tensors make up which of our parameters.

A map is written once, from our parameter name to the foreign names whose tensors, stacked along rows, make it up
(model/weights/start.py applies it); released FLM checkpoints: model/weights/released.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.config import TextConfig, VisionConfig
from model.layers import PAD_POSITION
from model.vision.clip import IMAGE_MEAN
from model.weights.start import Rules

# CLIP image encoder (OpenAI and open_clip name it alike), below the prefix "visual.".
CLIP_RULES: Rules = (
    (r"patch_embedding\.weight", ("conv1.weight",)),
    (r"class_embedding", ("class_embedding",)),
    (r"position_embedding", ("positional_embedding",)),
    (r"(ln_pre|ln_post)\.(weight|bias)", (r"\1.\2",)),
    (r"blocks\.(\d+)\.qkv\.(weight|bias)", (r"transformer.resblocks.\1.attn.in_proj_\2",)),
    (r"blocks\.(\d+)\.out\.(weight|bias)", (r"transformer.resblocks.\1.attn.out_proj.\2",)),
    (r"blocks\.(\d+)\.(ln_1|ln_2)\.(weight|bias)", (r"transformer.resblocks.\1.\2.\3",)),
    (r"blocks\.(\d+)\.up\.(weight|bias)", (r"transformer.resblocks.\1.mlp.c_fc.\2",)),
    (r"blocks\.(\d+)\.down\.(weight|bias)", (r"transformer.resblocks.\1.mlp.c_proj.\2",)),
)

# EVA-CLIP's ViT as LAVIS and timm name it; of qkv's bias and of the tables: ``eva_image_encoder``.
EVA_RULES: Rules = (
    (r"patch_embedding\.(weight|bias)", (r"patch_embed.proj.\1",)),
    (r"class_embedding", ("cls_token",)),
    (r"position_embedding", ("pos_embed",)),
    (r"blocks\.(\d+)\.ln_([12])\.(weight|bias)", (r"blocks.\1.norm\2.\3",)),
    (r"blocks\.(\d+)\.qkv\.(weight|bias)", (r"blocks.\1.attn.qkv.\2",)),
    (r"blocks\.(\d+)\.out\.(weight|bias)", (r"blocks.\1.attn.proj.\2",)),
    (r"blocks\.(\d+)\.up\.(weight|bias)", (r"blocks.\1.mlp.fc1.\2",)),
    (r"blocks\.(\d+)\.down\.(weight|bias)", (r"blocks.\1.mlp.fc2.\2",)),
    (r"blocks\.(\d+)\.temporal\.(alpha|(?:query|key)\.(?:weight|bias))", (r"blocks.\1.temporal_merge.\2",)),
)

# CLIP's encoder as transformers names it, below the prefix "vision_model.".
HF_CLIP_RULES: Rules = (
    (r"patch_embedding\.weight", ("embeddings.patch_embedding.weight",)),
    (r"class_embedding", ("embeddings.class_embedding",)),
    (r"position_embedding", ("embeddings.position_embedding.weight",)),
    (r"ln_pre\.(weight|bias)", (r"pre_layrnorm.\1",)),
    (r"ln_post\.(weight|bias)", (r"post_layernorm.\1",)),
    (
        r"blocks\.(\d+)\.qkv\.(weight|bias)",
        tuple(rf"encoder.layers.\1.self_attn.{part}_proj.\2" for part in ("q", "k", "v")),
    ),
    (r"blocks\.(\d+)\.out\.(weight|bias)", (r"encoder.layers.\1.self_attn.out_proj.\2",)),
    (r"blocks\.(\d+)\.ln_([12])\.(weight|bias)", (r"encoder.layers.\1.layer_norm\2.\3",)),
    (r"blocks\.(\d+)\.up\.(weight|bias)", (r"encoder.layers.\1.mlp.fc1.\2",)),
    (r"blocks\.(\d+)\.down\.(weight|bias)", (r"encoder.layers.\1.mlp.fc2.\2",)),
)


def bert_layer(ours: str, foreign: str) -> Rules:
    """Rules of one kind of BERT layer; ``ours`` is a pattern with one group, the layer number, ``foreign`` uses it."""
    return (
        (
            rf"{ours}\.attention\.qkv\.(weight|bias)",
            tuple(rf"{foreign}.attention.self.{part}.\2" for part in ("query", "key", "value")),
        ),
        (rf"{ours}\.attention\.out\.(weight|bias)", (rf"{foreign}.attention.output.dense.\2",)),
        (rf"{ours}\.residual\.norm\.(weight|bias)", (rf"{foreign}.attention.output.LayerNorm.\2",)),
        (rf"{ours}\.cross_attention\.query\.(weight|bias)", (rf"{foreign}.crossattention.self.query.\2",)),
        (
            rf"{ours}\.cross_attention\.key_value\.(weight|bias)",
            tuple(rf"{foreign}.crossattention.self.{part}.\2" for part in ("key", "value")),
        ),
        (rf"{ours}\.cross_attention\.out\.(weight|bias)", (rf"{foreign}.crossattention.output.dense.\2",)),
        (rf"{ours}\.cross_residual\.norm\.(weight|bias)", (rf"{foreign}.crossattention.output.LayerNorm.\2",)),
        (rf"{ours}\.ffn\.up\.(weight|bias)", (rf"{foreign}.intermediate.dense.\2",)),
        (rf"{ours}\.ffn\.down\.(weight|bias)", (rf"{foreign}.output.dense.\2",)),
        (rf"{ours}\.ffn\.residual\.norm\.(weight|bias)", (rf"{foreign}.output.LayerNorm.\2",)),
    )


ROBERTA_KIND = ("roberta", "xlm-roberta", "camembert")
FOREIGN_POSITIONS = "embeddings.position_embeddings.weight"

# RoBERTa and BERT as transformers names them; of token_type, a table there, the first row is a vector here.
ROBERTA_RULES: Rules = (
    (r"embedding\.word\.weight", ("embeddings.word_embeddings.weight",)),
    (r"embedding\.position\.weight", (FOREIGN_POSITIONS,)),
    (r"embedding\.token_type", ("embeddings.token_type_embeddings.weight",)),
    (r"embedding\.norm\.(weight|bias)", (r"embeddings.LayerNorm.\1",)),
    *bert_layer(r"bottom\.(\d+)", r"encoder.layer.\1"),
)


class Foreign(NamedTuple):
    """What ``start_from`` needs of a foreign model: its tensors, our names for them, those that we leave out."""

    state: dict[str, Tensor]
    rules: Rules
    dropped: tuple[str, ...]


def clip_image_encoder(state: Mapping[str, Tensor], config: VisionConfig) -> Foreign:
    """The image encoder in a state dict of CLIP, in the layout of OpenAI and open_clip or of transformers.

    Left out: the output projection, and the last block where the tower has none.

    Raises:
        ValueError: there is no such encoder.
    """
    own, theirs = (rf"{blocks}\.{config.layers - 1}\..+" for blocks in (r"transformer\.resblocks", r"encoder\.layers"))
    layouts = (
        ("visual.", "conv1.weight", CLIP_RULES, "proj", own),
        ("", "class_embedding", CLIP_RULES, "proj", own),  # the encoder alone
        ("vision_model.", "embeddings.class_embedding", HF_CLIP_RULES, r"embeddings\.position_ids", theirs),
    )
    for prefix, known, rules, unused, last_block in layouts:
        if prefix + known in state:
            part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            return Foreign(part, rules, (unused, last_block) if config.drop_last_block else (unused,))
    found = ", ".join(sorted(state)[:3]) or "nothing"
    raise ValueError(
        f"holds no visual.* keys (found {found} ..); expected the state dict of a CLIP model, of open_clip's or"
        " transformers' names; towers of another kind are named by model.vision.name"
    )


def eva_image_encoder(state: Mapping[str, Tensor], config: VisionConfig) -> Foreign:
    """The image encoder in a state dict of EVA-CLIP's ViT, in the layout of LAVIS (``eva_vit_g.pth``) or of timm.

    Left out: the last block where the tower has none, norms and projections behind the blocks.
    """
    own = {
        name: value[0, 0] if name == "cls_token" else value[0] if name == "pos_embed" else value
        for name, value in state.items()
        if not re.fullmatch(r"blocks\.\d+\.attn\.[qkv]_bias", name)
    }
    for name in state:
        block, is_query, _ = name.partition(".attn.q_bias")
        if is_query:
            query, value = state[name], state[f"{block}.attn.v_bias"]
            own[f"{block}.attn.qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    last_block = rf"blocks\.{config.layers - 1}\..+"
    unread = (r"(fc_)?norm\.(weight|bias)", r"(head|lm_head)\.(weight|bias)")
    return Foreign(own, EVA_RULES, (last_block, *unread) if config.drop_last_block else unread)


def refuse_other_network(config: VisionConfig, tag: str, known: Mapping[str, Any]) -> None:
    """Raises ValueError for published weights (their record in open_clip) that want another activation or other pixels.

    Their names and shapes fit, so nothing else would notice.
    """
    refuse_other_activation(config.name, config.quick_gelu, tag, known)
    if tuple(known.get("mean", IMAGE_MEAN)) != IMAGE_MEAN:
        raise ValueError(
            f"{tag}'s weights want other pixels than CLIP's; use model.vision.name open_clip/{config.name}"
        )


def refuse_other_activation(name: str, quick_gelu: bool, tag: str, known: Mapping[str, Any]) -> None:
    """The first half of :func:`refuse_other_network`; ``quick_gelu`` is what the model named has."""
    if known and known.get("quick_gelu", False) != quick_gelu:
        plain = name.removesuffix("-quickgelu")
        other, wanted = (plain, "GELU") if quick_gelu else (f"{plain}-quickgelu", "QuickGELU")
        raise ValueError(f"{tag}'s weights want {wanted}, which {name} has not; use model.vision.name {other}")


def bert_bottom(state: Mapping[str, Tensor], foreign: Any, config: TextConfig) -> Foreign:
    """Embedding and lower layers of a RoBERTa or BERT, given its configuration ``foreign`` (of transformers).

    Left out: its upper layers, pooler and further token types.
    NOTE BERT's LayerNorm adds 1e-12 to the variance, RoBERTa's and ours 1e-5.

    Raises:
        ValueError: it computes something else with tensors of the same names and shapes.
    """
    _refuse_other_text_model(foreign, config)
    own = dict(state)
    own[FOREIGN_POSITIONS] = _positions_from_ours(own[FOREIGN_POSITIONS], _first_position(foreign))
    upper = "|".join(str(number) for number in range(config.bottom_layers, foreign.num_hidden_layers))
    left_out = (rf"encoder\.layer\.({upper})\..+", r"pooler\..+", r"embeddings\.(position_ids|token_type_ids)")
    return Foreign(own, ROBERTA_RULES, left_out)


def _refuse_other_text_model(foreign: Any, config: TextConfig) -> None:
    """Raises ValueError for a model that computes something else with tensors of the same names and shapes."""
    if foreign.model_type not in ("bert", *ROBERTA_KIND):
        raise ValueError(f"is of type {foreign.model_type}, expected roberta or bert; name one of these")
    if foreign.num_attention_heads != config.heads:
        raise ValueError(
            f"has {foreign.num_attention_heads} attention heads, the model {config.heads}; set"
            f" --model.text.heads {foreign.num_attention_heads}"
        )
    positions = getattr(foreign, "position_embedding_type", "absolute")
    if foreign.hidden_act != "gelu" or positions != "absolute":
        raise ValueError(
            f"has activation {foreign.hidden_act} and {positions} positions, expected gelu and absolute;"
            " name another model"
        )


def _first_position(foreign: Any) -> int:
    """Row of a foreign position table where the first token stands: RoBERTa counts on from its padding, BERT from 0."""
    return foreign.pad_token_id + 1 if foreign.model_type in ROBERTA_KIND else 0


def _positions_from_ours(table: Tensor, first: int) -> Tensor:
    """A position table whose first token stands at row ``first`` as one of ours, where it stands behind the padding."""
    ours = PAD_POSITION + 1
    return table if first == ours else torch.cat([table.new_zeros(ours, table.shape[1]), table[first:]])
