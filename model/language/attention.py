"""The attention that language models of transformers run here: PyTorch's fused one, on a CPU in bf16 our own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from model.cpu import door

NAME = "openflm"  # among transformers' attentions
_PYTORCHS = ("position_bias", "softcap", "cache")  # what only PyTorch's attention knows, or refuses


def use_it(llm: Any) -> None:
    """Have a language model that would run PyTorch's fused attention run ``attention``."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    if llm.config._attn_implementation == "sdpa":
        llm.set_attn_implementation(NAME)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: query [R, H, L, C], key and value [R, K, T, C] -> [R, L, H, C]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    is_ours = (
        query.dtype == torch.bfloat16
        and door.is_open(query.device)
        and attention_mask is not None
        and attention_mask.is_floating_point()
        and not dropout
        and all(others.get(name) is None for name in _PYTORCHS)
    )
    if not is_ours:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **others)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    states = door.half_attention(query, key, value, attention_mask, scale)
    return states.transpose(1, 2).contiguous(), None
