"""The one-stream network of the baselines MLM, AR and PrefixLM: FLM's towers, one text stream, no reconstructor.

Legend: R text rows, T padded length, N states, D width.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from model import masks
from model.attention import Packing, image_reading, reads_by_rows, text_reading
from model.batch import Batch
from model.config import ModelConfig, Vocabulary
from model.dropout import dropout
from model.towers import add_towers, encode_images, reset_parameters


class StreamFeatures(NamedTuple):
    """Output of the network: ``l2r`` [N, D], the states of the one stream in the order of its index."""

    l2r: Tensor


class OneStream(nn.Module):
    """Encodes captions over an image; which states see each other is ``batch.prefix`` (specification section 4)."""

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary, causal: bool) -> None:
        """``causal`` matters to the released behaviour only, where `<s>` sees all words and is seen by none."""
        super().__init__()
        self.released = config.behaviour == "released"
        self.vocabulary = vocabulary
        self.dropout = config.text.dropout
        self._hidden_start = self.released and causal
        add_towers(self, config, vocabulary)
        reset_parameters(self)

    def forward(self, batch: Batch) -> StreamFeatures:
        """Runs a whole batch; images uint8 [B, 1, 3, S, S]."""
        return self.fuse(batch, encode_images(self, batch))

    def fuse(self, batch: Batch, images: Tensor) -> StreamFeatures:
        """The text side, given projected image tokens [B, P, D]."""
        (num_rows, num_positions), (num_images, num_tokens) = batch.text.shape, images.shape[:2]
        packing = Packing(batch.l2r_index, num_rows, num_positions)
        if self._hidden_start:
            mask = masks.released_streams(batch.lengths, num_positions)[0]
        else:
            mask = masks.prefix_stream(batch.lengths, batch.prefix, num_positions)
        by_rows = reads_by_rows(images.device, self.dropout if self.training else 0.0)
        among_states = text_reading(packing, packing, mask, num_rows, by_rows)
        of_images = image_reading(packing, batch.image_of_row, batch.num_paired, num_images, num_tokens, by_rows)
        images = images.flatten(0, 1)
        states = self.embedding(batch.text.flatten()[batch.l2r_index], batch.l2r_index % num_positions)
        states = dropout(states, self.dropout) if self.training else states
        for layer in self.bottom:
            states = layer(states, among_states)
        states = self.text_projection(states) + self.type_embedding.weight[0]
        for layer in self.top:
            states = layer(states, among_states, images, of_images)
        return StreamFeatures(states)
