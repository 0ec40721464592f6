"""The one-stream network of the baselines MLM, AR and PrefixLM: FLM's towers, one text stream, no reconstructor.

Legend: R text rows, T padded length, N states, D width.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from model import masks
from model.attention import Packing, image_attention, text_attention
from model.batch import Batch, TextPlan
from model.config import ModelConfig, Vocabulary
from model.dropout import dropout
from model.recomputing import run
from model.towers import add_towers, encode_images, reset_parameters


class StreamFeatures(NamedTuple):
    """Output of the network: ``l2r`` [N, D], the states of the one stream in the order of its index.

    What was before text met image: ``bottom`` [N, D], the states behind the bottom half, in the same order, and
    ``images`` [B*I, P, D], the projected tokens.
    """

    l2r: Tensor
    bottom: Tensor
    images: Tensor


class OneStream(nn.Module):
    """Encodes captions over an image; which states see each other is ``TextPlan.prefix`` (specification section 4)."""

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary, causal: bool, num_images: int = 1) -> None:
        """``causal`` matters to the released behaviour only, where `<s>` sees all words and is seen by none;
        ``num_images`` of a sample.
        """
        super().__init__()
        self.released = config.behaviour == "released"
        self.vocabulary = vocabulary
        self.dropout = config.text.dropout
        self._hidden_start = self.released and causal
        add_towers(self, config, vocabulary, num_images)
        reset_parameters(self)

    def forward(self, batch: Batch) -> StreamFeatures:
        """Runs a whole plan."""
        return self.fuse(batch.plan, self.encode(batch.images))

    def encode(self, images: Tensor) -> Tensor:
        """uint8 [B, I, 3, S, S] -> projected tokens [B*I, P, D]."""
        return encode_images(self, images)

    def fuse(self, plan: TextPlan, images: Tensor) -> StreamFeatures:
        """The text side, given projected tokens [B*I, P, D] of all images."""
        (num_rows, num_positions), (num_images, num_tokens) = plan.text.shape, images.shape[:2]
        packing = Packing(plan.l2r_index, num_rows, num_positions)
        mask = self.stream_masks(plan)[0]
        rate = self.dropout if self.training else 0.0
        attend_text = text_attention(packing, packing, mask, num_rows, rate)
        attend_images = image_attention(packing, plan.image_of_row, plan.num_paired, num_images, num_tokens, rate)
        tokens = images.flatten(0, 1)
        states = self.embedding(plan.text.flatten()[plan.l2r_index], plan.l2r_index % num_positions)
        states = dropout(states, self.dropout) if self.training else states
        recompute = self.recompute and self.training
        for layer in self.bottom:
            states = run(layer, states, attend_text, recompute=recompute)
        bottom = states
        states = self.text_projection(states) + self.type_embedding.weight[0]
        for layer in self.top:
            states = run(layer, states, attend_text, tokens, attend_images, recompute=recompute)
        return StreamFeatures(states, bottom, images)

    def stream_masks(self, plan: TextPlan) -> Tensor:
        """Which states see each other, bool [1, R, T, T]."""
        if self._hidden_start:
            return masks.released_streams(plan.lengths, plan.text.shape[1])[:1]
        return masks.prefix_stream(plan.lengths, plan.prefix, plan.text.shape[1])[None]
