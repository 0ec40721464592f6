"""Checkpoints of EVLGen's release: their key names, sizes and layout, all accounted for."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from model.config import ConnectorConfig
from model.objectives.evlgen import ImageToText
from model.weights.connectors import TOMEFORMER_RULES
from model.weights.start import Rules
from model.weights.towers import EVA_RULES

PREFIX = "VLconnector."
OF_CONNECTOR: Rules = (
    (r"net\.connector\.norm\.(weight|bias)", (r"ln_vision.\1",)),
    (r"net\.connector\.input\.(weight|bias)", (r"VL_proj.\1",)),
    *((rf"net\.connector\.body\.{ours}", tuple(f"{PREFIX}{n}" for n in theirs)) for ours, theirs in TOMEFORMER_RULES),
    (r"net\.connector\.output\.(weight|bias)", (r"llm_proj.\1",)),
)
OF_VIDEO: Rules = tuple(
    (rf"net\.vision\.{ours}", tuple(f"visual_encoder.{name}" for name in theirs)) for ours, theirs in EVA_RULES[-1:]
)
RULES: Rules = (*OF_CONNECTOR, *OF_VIDEO)
FROZEN = ImageToText.elsewhere

# Stored in released checkpoints, trained by nothing (specification section 10, B4, and section 11).
DEAD = (
    r"opt_model\.lm_head\.weight",
    r"llm_model\..*inv_freq",
    r"temp",
    r"(vision|text)_proj\.(weight|bias)",
    r"SimCSE\..+",
)
RELEASED_MERGES, RELEASED_HEAD_WIDTH = 19, 64  # in no tensor's shape


def by_one_name(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with one name for the last linear layer, which the release names after the kind of language model."""
    return {re.sub(r"^opt_proj\.", "llm_proj.", name): value for name, value in state.items()}


def read_connector(state: Mapping[str, Tensor], merges: int = RELEASED_MERGES) -> tuple[ConnectorConfig, int, int]:
    """The connector of a released state dict (``by_one_name``), the width of its tower and of its language model.

    Raises:
        ValueError: a name that every released checkpoint has is missing.
    """
    wanted = {name: f"{PREFIX}{name}" for name in ("embeddings.position_embeddings.weight",)}
    wanted |= {"ffn": f"{PREFIX}encoder.layer.0.intermediate.dense.weight", "in": "VL_proj.weight"}
    wanted |= {"out": "llm_proj.weight"}
    missing = [name for name in wanted.values() if name not in state or state[name].ndim != 2]
    if missing:
        found = ", ".join(sorted(state)[:3]) or "nothing"
        raise ValueError(
            f"no matrix {missing[0]}; expected the state dict of a released EVLGen checkpoint, found {found} .."
        )
    max_positions, width = state[wanted["embeddings.position_embeddings.weight"]].shape
    layers = {found[1] for name in state if (found := re.match(rf"{re.escape(PREFIX)}encoder\.layer\.(\d+)\.", name))}
    config = ConnectorConfig(
        merging="plain",
        merges_per_layer=merges,
        width=width,
        heads=max(width // RELEASED_HEAD_WIDTH, 1),
        ffn_width=state[wanted["ffn"]].shape[0],
        layers=len(layers),
        max_positions=max_positions,
    )
    return config, state["VL_proj.weight"].shape[1], state["llm_proj.weight"].shape[0]


def is_video(state: Mapping[str, Tensor]) -> bool:
    """Whether the checkpoint is one of the video model."""
    return any(name.startswith("visual_encoder.") and ".temporal_merge." in name for name in state)
