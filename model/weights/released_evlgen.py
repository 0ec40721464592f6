"""Checkpoints of EVLGen's release: their key names, all accounted for."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from model.weights.connectors import TOMEFORMER_RULES
from model.weights.start import Rules
from model.weights.towers import EVA_RULES

RULES: Rules = (
    (r"net\.connector\.norm\.(weight|bias)", (r"ln_vision.\1",)),
    (r"net\.connector\.input\.(weight|bias)", (r"VL_proj.\1",)),
    *(
        (rf"net\.connector\.body\.{ours}", tuple(f"VLconnector.{name}" for name in theirs))
        for ours, theirs in TOMEFORMER_RULES
    ),
    (r"net\.connector\.output\.(weight|bias)", (r"llm_proj.\1",)),
    *((rf"net\.vision\.{ours}", tuple(f"visual_encoder.{name}" for name in theirs)) for ours, theirs in EVA_RULES[-1:]),
)

# Stored in released checkpoints, trained by nothing (specification section 10, B4, and section 11).
DEAD = (
    r"opt_model\.lm_head\.weight",
    r"llm_model\..*inv_freq",
    r"temp",
    r"(vision|text)_proj\.(weight|bias)",
    r"SimCSE\..+",
)
FROZEN = (r"net\.vision\.(?!blocks\.\d+\.temporal\.).+", r"net\.language\..+")  # not in a checkpoint


def by_one_name(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with one name for the last linear layer, which the release names after the kind of language model."""
    return {name.replace("opt_proj.", "llm_proj."): value for name, value in state.items()}
