"""Weights of BERT that connectors begin with: which of its tensors make up which of theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from model.config import ConnectorConfig
from model.weights.start import Rules
from model.weights.towers import FOREIGN_POSITIONS, Foreign, bert_layer

TOMEFORMER_RULES: Rules = (
    (r"position\.weight", (FOREIGN_POSITIONS,)),
    (r"token_type", ("embeddings.token_type_embeddings.weight",)),
    (r"norm\.(weight|bias)", (r"embeddings.LayerNorm.\1",)),
    *bert_layer(r"layers\.(\d+)", r"encoder.layer.\1"),
)
QFORMER_FRESH = (r"queries", r"layers\.\d+\.cross_(attention|residual)\..+")  # BERT has none


def bert_of_connector(state: Mapping[str, Tensor], foreign: Any, config: ConnectorConfig) -> Foreign:
    """What ``start_from`` needs for the body of a tomeformer or qformer, from a BERT of transformers' names.

    Left out: its words, pooler and heads, and the layers beyond the connector's own.

    Raises:
        ValueError: ``foreign``, its configuration, is of another kind of model, or of other sizes than shapes tell.
    """
    if foreign.model_type != "bert" or foreign.hidden_act != "gelu":
        raise ValueError(f"is of type {foreign.model_type} with {foreign.hidden_act}, expected bert with gelu")
    if foreign.num_attention_heads != config.heads:
        raise ValueError(
            f"has {foreign.num_attention_heads} attention heads, the connector {config.heads}; set"
            f" --model.connector.heads {foreign.num_attention_heads}"
        )
    own = {name.removeprefix("bert."): value for name, value in state.items()}
    upper = "|".join(str(number) for number in range(config.layers, foreign.num_hidden_layers))
    unread = (r"embeddings\.(word_embeddings\.weight|position_ids|token_type_ids)", r"(pooler|cls)\..+")
    if config.name == "qformer":
        unread = (*unread, FOREIGN_POSITIONS.replace(".", r"\."), r"embeddings\.token_type_embeddings\.weight")
    return Foreign(own, TOMEFORMER_RULES, (*unread, rf"encoder\.layer\.({upper})\..+"))
