"""Analytic cost of a batch in multiply-accumulates, part by part.

A linear layer of [m, k] x [k, n] costs m*k*n; attention of q queries on t keys of total width D costs 2*q*t*D, counted
over the padded grid, as it runs on accelerators (row by row it is less). Training costs three times the forward pass
(two products per product in backward), so FLOPs = 2 * 3 * MACs; recomputation (vocabulary logits) is not model work and
not counted.
"""

from __future__ import annotations

from collections.abc import Mapping

from model.batch import Batch
from model.config import ModelConfig
from model.vision.tower import Tower


def forward_macs(
    config: ModelConfig, tower: Tower, vocabulary_size: int, batch: Batch, streams: int, contrast_width: int = 0
) -> dict[str, int]:
    """Multiply-accumulates of one forward pass of pretraining, by part of the model; FLM has 2 ``streams``.

    ``contrast_width`` of the space where pooled texts and images are compared, 0 where they are not.
    """
    square, num_images = config.text.width**2, batch.images.shape[0] * batch.images.shape[1]
    kinds = ("token", "class", "contrast")
    targets = {kind: sum(len(t.target) for t in batch.terms.values() if t.kind == kind) for kind in kinds}
    contrasted = targets["contrast"]
    return network_macs(config, tower, batch, streams) | {
        "lm_head": targets["token"] * (square + config.text.width * vocabulary_size),
        "matching": targets["class"] * (square + 2 * config.text.width),
        "contrast": ((contrasted + num_images) * config.text.width + contrasted * num_images) * contrast_width,
    }


def network_macs(config: ModelConfig, tower: Tower, batch: Batch, streams: int) -> dict[str, int]:
    """The same of the network alone, without pooler and heads."""
    text, image_tokens = config.text, tower.num_tokens
    width, ffn = text.width, 2 * text.width * text.ffn_width
    plan, num_images = batch.plan, batch.images.shape[0] * batch.images.shape[1]
    num_rows, length = plan.text.shape
    states, queries = plan.l2r_index.shape[0] + plan.r2l_index.shape[0], plan.query_index.shape[0]
    square = width * width

    self_attention = states * 4 * square + streams * num_rows * 2 * length * length * width
    image_attention = (
        states * 2 * square
        + num_images * image_tokens * 2 * square
        + streams * num_rows * 2 * length * image_tokens * width
    )
    reconstruction = queries * (2 * square + ffn) + states * 2 * square + 2 * num_rows * length * 2 * length * width
    rb, rt = config.reconstructor.bottom_layers, config.reconstructor.top_layers
    layers = (text.bottom_layers if rb is None else rb) + (text.top_layers if rt is None else rt) if streams == 2 else 0
    return {
        "vision": 0 if batch.images.ndim == 4 else num_images * tower.macs,  # features were computed before
        "bottom_text": text.bottom_layers * (self_attention + states * ffn),
        "top_text": text.top_layers * (self_attention + image_attention + states * ffn)
        + (states + queries) * square
        + num_images * image_tokens * tower.width * width,
        "reconstructor": layers * reconstruction,
    }


def training_flops(config: ModelConfig, macs: Mapping[str, int]) -> int:
    """Floating-point operations of forward and backward, given the ``macs`` of a forward pass; a frozen tower has no
    backward.
    """
    return 6 * sum(macs.values()) - (4 * macs["vision"] if config.vision.frozen else 0)
